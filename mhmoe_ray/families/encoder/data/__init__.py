"""Samples of an encoder of images and texts. A part of a micro-batch is one objective with its data.

masking.py   masks of patches and tokens: pure functions of (seed, part, position of the sample)
samples.py   samples from stored rows: crops, tokens and masks, part by part
batches.py   micro-batches: tensors and targets
columns.py   the columns of samples in memory
rows.py      settings and files of a prepared folder, and rows of the stream
codebook.py  the codebook of image patches
"""
