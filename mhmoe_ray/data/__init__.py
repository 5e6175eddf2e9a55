"""From raw text to the micro-batches of a training step.

sources/ -> tokenizer.py -> pack.py -> shards.py   made once by prepare.py, described by manifest.py
mixture.py -> order.py -> stream.py                read in an order that is a pure function of (seed, position)

mixture.py has the rules of the spec, apportion.py their rounding; order.py joins interleave.py, which domain comes
next, and permutation.py, which of its samples.
"""

SAYS = "prepare: "
"""Begins the lines of a job's log that tell how far `prepare` is."""
