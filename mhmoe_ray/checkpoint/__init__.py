"""Checkpoints of a run: written on any mesh, read on any other, served as they are stored.

manifest.py     a checkpoint's manifest, whose presence is the commit
format.py       slices of tensors in its safetensors files
save.py         write checkpoints beside training, each rank its own share
load.py         load tensors at any world size, a trainer's state, or a model
tokenizer.py    the tokenizer of the checkpoint's run
retention.py    checkpoint retention: which checkpoints are kept
huggingface/    export to and import from folders in Hugging Face's layout
"""
