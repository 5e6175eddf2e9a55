"""Samples of an encoder of images and texts.

masking.py   masks of patches and tokens: pure functions of (seed, part, position)
samples.py   samples from stored rows: crops, tokens and masks, part by part
batches.py   micro-batches: tensors and targets
"""
