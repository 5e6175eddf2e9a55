"""The prepared data: a folder of packed samples.

manifest.py   the data manifest: the contents of the folder
recipe.py     the settings of a spec that determine the content of the folder, and their comparison
columns.py    the columns of samples, in memory and in shards
files.py      shard files: their layout, and the writer of stored samples
reader.py     the reader of stored samples, on local disks and object stores
cache.py      the cache of a node for shards on an object store
ranges.py     single rows of a shard on an object store
documents.py  the index of the documents in a shard
copy.py       copies of folders, from or to an object store
verify.py     the check of all files of a folder
"""
