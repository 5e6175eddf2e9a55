"""Checkpoints of training runs. They are written on any device mesh, and are loaded on any other or for serving.

manifest.py     the checkpoint manifest, whose presence commits a checkpoint
find.py         find a checkpoint by its name, by its step, or by its run and step as RUN@STEP
format.py       slices of tensors in a checkpoint's safetensors files
save.py         write checkpoints in the background of training, each rank its own share
load.py         load tensors at any world size, a trainer's state, or a model
run_files.py    files in the run directory that a model needs, verified by their hashes
tokenizer.py    the tokenizer of the checkpoint's run
retention.py    checkpoint retention: keep the newest checkpoints, the best one and served ones
start/          runs that start from the weights of other models
huggingface/    export to and import from folders in Hugging Face's layout
"""
