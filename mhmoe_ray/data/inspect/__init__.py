"""Inspection of raw text: statistics of its documents, and problems in them.

    figures.py    statistics of documents: counts, and histograms of lengths, summed by domain and language
    textrules.py  rules that find signs of damage in a single text, one small function for each rule
    survey.py     reads all files of a spec with Ray Data: statistics, problems, and an entry for each document
    copies.py     counts duplicate texts from the entries of documents
    result.py     the result of a survey, and the request for one
    job.py        the cluster job that makes a survey
    lint.py       lists the problems in a survey and a spec, one function for each rule
    samples.py    decodes packed training samples to text

survey.py, job.py and samples.py need Ray; the other modules do not.
"""
