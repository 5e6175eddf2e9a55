"""Samples of a vision model: images with classes or objects. A task is a classifier or a detector of the model.

fit.py          the place of a whole image in the square that the model reads
columns.py      samples in memory, and as columns of the training stream
samples.py      samples from stored rows, task by task
batches.py      micro-batches as tensors on a device
rows.py         settings and files of a prepared folder, and rows of the stream
"""
