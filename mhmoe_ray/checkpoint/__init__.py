"""Checkpoints of a run: written by any mesh, read by any other, served as they lie.

manifest.py     a checkpoint's manifest, whose presence is the commit
format.py       slices of tensors in its safetensors files
save.py         written beside training, each rank its own share
load.py         tensors at any world size, a trainer's state, a model
tokenizer.py    the tokenizer of its run
retention.py    which checkpoints stay
huggingface/    to and from folders in Hugging Face's layout
"""
