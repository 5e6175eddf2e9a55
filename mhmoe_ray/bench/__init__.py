"""Side-by-side measurements: what a layer costs beside a dense one of the same work, and a whole training step.

layers.py        layers that are matched
peers.py         other packages' layers, of our weights
timing.py        interleaved rounds, medians and ratios
memory.py        bytes of one pass, at its peak and between forward and backward
measure.py       all of it at one shape
sweep.py         all of it along an axis; how cost grows
plot.py          a sweep as a picture
steps.py         whole training steps of models that are matched
dispatch/        flat and hierarchical dispatch between two nodes
run.py           a whole run beside the same steps in a bare loop
apart.py         what starts Ray: each in a process of its own
checkpoints.py   how long a checkpoint holds training up
commands.py      how long commands take, as processes
ingest/          text to micro-batches beside other packages
serve/           answers a second beside other packages
paper.py         the first paper's throughput, to set beside
hardware.py      the device that runs it
"""
