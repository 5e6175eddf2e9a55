"""Benchmarks that compare their cases side by side, for example layers or training steps of equal work.

timing.py       interleaved rounds, medians and ratios; the device; errors of measurements
processes.py    run a measurement in a process of its own
process_memory.py   memory of a process and its descendants
layers.py       matched layers
peers.py        layers of other packages, with our weights
measure.py      measure all layers at one shape: bytes of a pass, then time
sweep.py        measure all layers along an axis, and the growth of their cost
plot.py         draw a sweep
steps.py        whole training steps of matched models
loss.py         the output layer with its loss, for all logits at once and chunk by chunk
checkpoints.py  time that a checkpoint blocks training
run.py          a run beside the same steps in a bare loop
commands.py     latency of the command line
acceptance/     what one GPU shows in half an hour, beside predictions
dispatch/       flat and hierarchical dispatch between two nodes
ingest.py       from text to shards to micro-batches
serve/          throughput of engines and servers
"""
