"""Image files: their check and their decoding, and their classes and objects. Shards store images as encoded files.

files.py        checks image files, and decodes them
annotations.py  classes and objects of images, and how they are stored
"""
