"""The prepared data: a folder of packed samples.

manifest.py   the data manifest: the contents of the folder
recipe.py     the settings of a spec that determine the content of the folder, and their comparison
columns.py    the columns of samples, in memory and in shards
files.py      shard files: the writer and the reader of stored samples
verify.py     the check of all files of a folder
"""
