"""Preparation: a job of the cluster that turns raw text and images into shards of training samples.

A chunk is some consecutive documents of a raw file. A part is the file of the tokens of a chunk.

job.py          entry point of the job of `mhmoe data prepare`
pipeline.py     the stages of the job, with Ray Data: chunks to parts, parts to shards
chunks.py       reads the documents of raw files in chunks, and quarantines unreadable lines
tokenise.py     turns a chunk into a part
parts.py        records of parts, and the tokens of a domain as one stream over its parts
documents.py    the documents of a shard, for its index
packing.py      plans shards, by concatenation or best fit, and writes them
rows.py         makes parts, shards and validation samples for encoders and vision models, with images
checks.py       checks that there are enough samples, before shards are written
finish.py       makes validation samples, baselines, and the manifest's entries
validation.py   selects the held-out documents, and makes the validation samples from them
baselines.py    computes the unigram and bigram baselines of the validation loss
work.py         manages the staging directories, the progress report, and the publishing of the result
"""
