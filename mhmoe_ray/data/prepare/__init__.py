"""Raw text to packed shards, as a job of the cluster.

job.py          the job of `mhmoe data prepare`
pipeline.py     what it does, by Ray Data: chunks to parts, parts to shards
chunks.py       documents of raw files in chunks, and the quarantine of what could not be read
tokenise.py     a chunk to a part: its tokens in one file
parts.py        the tokens of a domain as one stream over its parts
packing.py      what each shard is made of, by concatenation or best fit, and the task that makes it
validation.py   which documents are held out, and the samples made of them
baselines.py    what counting alone predicts of them
work.py         the folders it works in, how far it is, and the result's name
"""
