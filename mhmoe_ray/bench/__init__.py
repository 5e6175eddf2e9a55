"""Side-by-side measurements: what a layer costs beside a dense one of the same work, and a whole training step.

timing.py       interleaved rounds, medians and ratios; the device; what cannot be measured
processes.py    a measurement in a process of its own
process_memory.py   the memory of a process and its children
layers.py       layers that are matched
peers.py        other packages' layers, with our weights
measure.py      all of them at one shape: bytes of a pass, then time
sweep.py        all of it along an axis; how cost grows
plot.py         a sweep as a picture
steps.py        whole training steps of models that are matched
checkpoints.py  how long a checkpoint holds training up
run.py          a run beside its steps in a bare loop
commands.py     how long the command line lets one wait
dispatch/       flat and hierarchical dispatch between two nodes
ingest.py       text to shards to micro-batches
serve/          answers of engines and servers
"""
