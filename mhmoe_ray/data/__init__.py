"""From raw text to the micro-batches of a training step.

sources/     raw text of any format, one document at a time
inspect/     what is in raw text, and what is wrong with it
tokenizer/   text to token ids
prepare/     sources -> tokenizer -> packed samples, once, as a job
shards/      what that made: a folder of samples and its manifest
order/       which sample comes when: a pure function of (seed, position)
domains.py   names of domains and languages
stream.py    shards in that order, to the workers of a training
"""
