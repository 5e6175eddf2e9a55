"""Side-by-side measurements: what a layer costs beside a dense one of the same work, and a whole training step.

layers.py       layers that are matched
peers.py        other packages' layers, of our weights
timing.py       interleaved rounds, medians and ratios
measure.py       bytes of one pass, at its peak and between forward and backward
measure.py      all of it at one shape
sweep.py        all of it along an axis; how cost grows
plot.py         a sweep as a picture
steps.py        whole training steps of models that are matched
steps.py        the first paper's throughput, to set beside
checkpoints.py  how long a checkpoint holds training up
run.py          a run beside its steps in a bare loop
commands.py     how long the command line lets one wait
dispatch/       flat and hierarchical dispatch between two nodes
ingest/         text to shards to micro-batches
serve/          answers of engines and servers
processes.py        a measurement in a process of its own
timing.py       what is said of sizes that cannot be, and of a process that failed
timing.py    which other packages are there
timing.py     the device that runs it
"""
