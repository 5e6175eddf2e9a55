"""The prepared data: a folder of packed samples.

manifest.py   the data manifest: the contents of the folder, and the settings of its preparation
columns.py    the columns of samples, in memory and in shards
rows.py       Arrow files of an encoder's samples, which have a text, an image or both
files.py      Arrow files of samples: writing, reading and verifying them
"""
