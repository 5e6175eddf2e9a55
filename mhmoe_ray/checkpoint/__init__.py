"""Checkpoints of a run: written on any mesh, read on any other, served as they are stored.

manifest.py     the checkpoint manifest, whose presence commits a checkpoint
find.py         find a checkpoint by its name, by its step or as RUN@STEP
format.py       slices of tensors in a checkpoint's safetensors files
save.py         write checkpoints beside training, each rank its own share
load.py         load tensors at any world size, a trainer's state, or a model
run_files.py    files in the run directory that a model needs, verified by their hashes
tokenizer.py    the tokenizer of the checkpoint's run
retention.py    checkpoint retention: keep the newest checkpoints and the best one
start/          runs that start from the weights of other models
huggingface/    export to and import from folders in Hugging Face's layout
"""
