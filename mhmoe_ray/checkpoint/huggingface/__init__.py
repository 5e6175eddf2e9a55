"""Export of checkpoints to folders in Hugging Face's layout, which other tools read and write, and import from them.

names.py      the table of tensor names, for both directions
config.py     config.json and the `model` section, also of a Mixtral that this package did not write
files.py      safetensors files, read and written one layer at a time
tokenizer.py  tokenizer.json and tokenizer_config.json for other tools
export.py     `mhmoe ckpt export`: write a checkpoint to such a folder
import_.py    `mhmoe ckpt import`: create a run directory with one checkpoint from such a folder
"""
