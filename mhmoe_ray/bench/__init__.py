"""Benchmarks that measure alternatives side by side, for example layers or training steps of equal work.

timing.py       interleaved rounds, medians and ratios; the device; errors of measurements
processes.py    run a measurement in a process of its own
layers.py       expert layers of equal work
peers.py        expert layers of other packages, with our weights
measure.py      measure all layers at one set of sizes: bytes of a pass, then time
sweep.py        measure all layers at several values of one size, and the growth of their cost
plot.py         draw the results of a sweep
steps.py        whole training steps of matched models
plan.py         steps at one and two ranks beside the planner's estimates from measured ceilings
checkpoints.py  save a model in training, as a checkpoint or by torch.save
run.py          training on Ray beside the same steps in loops
loops.py        loops without Ray, by our trainer and by transformers' model
acceptance/     checks and measurements on one GPU in half an hour, beside predictions
serve/          throughput of engines and servers
"""
