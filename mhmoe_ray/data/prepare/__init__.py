"""Raw text to packed shards, as a job of the cluster.

job.py          the job of `mhmoe data prepare`
pipeline.py     what it does, by Ray Data: chunks to parts, parts to shards
chunks.py       documents of raw files in chunks: what one task tokenises
validation.py     which documents are kept for validation
tokenise.py     a chunk to a part: its tokens in one file
parts.py        the tokens of a domain as one stream over its parts
packing.py      what each shard is made of, and the task that makes it
packing.py       samples cut from documents one after another
packing.py     samples of whole documents
validation.py   the held-out samples
baselines.py    what counting alone predicts of them
chunks.py   what could not be read, and when that is too much
work.py     how far it is, for any command to read
work.py         the folders it works in, and the result's name
"""
