"""From raw text to the micro-batches of a training step.

corpus/      real text for a first run
sources/     raw text of any format, one document at a time
tokenizer/   text to token ids
prepare/     sources -> tokenizer -> packed samples, once, as a job
shards/      what that made: a folder of samples and its manifest
order/       which sample comes when: a pure function of (seed, position)
stream.py    shards in that order, to the workers of a training
"""

SAYS = "prepare: "
"""Begins the lines of a job's log that tell how far `prepare` is."""
