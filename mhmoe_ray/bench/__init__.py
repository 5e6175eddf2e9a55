"""Benchmarks that measure alternatives side by side, for example layers or training steps of equal work.

timing.py       interleaved rounds, medians and ratios; the device; errors of measurements
processes.py    run a measurement in a process of its own
process_memory.py   memory of a process and its descendants
layers.py       expert layers of equal work
peers.py        expert layers of other packages, with our weights
measure.py      measure all layers at one set of sizes: bytes of a pass, then time
sweep.py        measure all layers at several values of one size, and the growth of their cost
plot.py         draw the results of a sweep
steps.py        whole training steps of matched models
loss.py         the output layer with its loss, for all logits at once and chunk by chunk
checkpoints.py  time that a checkpoint blocks training
run.py          training on Ray beside the same steps in a bare loop
commands.py     latency of the command line
acceptance/     checks and measurements on one GPU in half an hour, beside predictions
dispatch/       flat and hierarchical dispatch between two nodes
ingest.py       from text to shards to micro-batches
serve/          throughput of engines and servers
"""
