"""Side-by-side measurements: what a layer costs beside a dense one of the same work, and a whole training step.

layers.py     layers that are matched
peers.py      other packages' layers, of our weights
timing.py     interleaved rounds, medians and ratios
memory.py     bytes of one pass, at its peak and between forward and backward
measure.py    all of it at one shape
sweep.py      all of it along an axis; how cost grows
plot.py       a sweep as a picture
steps.py      whole training steps of models that are matched
dispatch/     flat and hierarchical dispatch between two nodes
paper.py      the first paper's throughput, to set beside
hardware.py   the device that runs it
"""
