"""Checkpoints to and from folders in Hugging Face's layout, which other tools read and write.

names.py      the table of tensor names, for both directions
config.py     config.json and the `model` section, also of a Mixtral that never was ours
files.py      safetensors files, read and written a layer at a time
tokenizer.py  tokenizer.json and its configuration as other tools use them
export.py     `mhmoe ckpt export`: a checkpoint to such a folder
import_.py    `mhmoe ckpt import`: such a folder to a run directory that was never trained
"""
