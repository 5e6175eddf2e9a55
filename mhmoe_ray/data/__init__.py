"""The data pipeline: it turns raw text and images into the micro-batches of a training step.

sources/             reads raw text and images of any format, one document at a time
inspect/             surveys raw text and reports its problems
tokenizer/           turns text into token ids
chat/                renders conversations with a chat template, and marks the assistant's tokens
prepare/             the job that runs once: sources -> tokenizer -> packed samples
shards/              the prepared data: a folder of packed samples and its manifest
order/               the order of samples: a pure function of (seed, position)
images/              checks and decodes images, and their classes and objects
family.py            the interface of the data of a family of models
draws.py             random numbers that a seed and a label determine
domains.py           names of domains and languages
documents.py         the documents of a step, and the steps of a document
samples.py           the training samples by position, and the held-out samples
stream.py            streams the samples of the shards to the workers of a training, in the order of order/
"""
