"""What is in raw text, and what is wrong with it.

    figures.py    figures of documents and histograms of their lengths, which add up: by domain and language
    textrules.py  what a text tells by itself of being damaged, one small function a rule
    survey.py     all files of a spec by Ray Data: figures, findings, and an entry for each document
    copies.py     those entries: texts that are there more than once
    result.py     a survey: all of that together
    job.py        making one as a job of the cluster
    lint.py       what is wrong, by a survey and a spec: one function a rule
    samples.py    packed training samples as text

survey.py, job.py and samples.py need Ray; the rest is arithmetic.
"""
