"""Image files: their check, their decoding and their crops. Shards store images as encoded files.

files.py   checks image files, and decodes them
jpeg.py    counts the scans of a JPEG file without decoding it
crops.py   crops of images: pure functions of (seed, part of a micro-batch, position of the sample)
"""
