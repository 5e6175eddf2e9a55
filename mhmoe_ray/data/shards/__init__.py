"""The prepared data: a folder of packed samples.

manifest.py   the data manifest: the contents of the folder
recipe.py     the settings of a spec that determine the content of the folder, and their comparison
columns.py    the columns of samples, in memory and in shards
rows.py       Arrow files of samples with images, for encoders and vision models
files.py      Arrow files of samples of text, and the check of all files of a folder
"""
