"""Text to shards to micro-batches, beside what other packages offer for it.

ours.py        `prepare` and the training stream
peers.py       Hugging Face's datasets and MosaicML's streaming, where they are installed
contest.py     all of them in turn, each in a process of its own
memory.py      what a process and those below it take of it
"""
