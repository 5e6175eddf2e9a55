"""From raw text to the micro-batches of a training step.

sources/ -> tokenizer.py -> pack.py -> shards.py   made once by prepare.py, described by manifest.py
order.py + mixture.py -> stream.py                 read in an order that is a pure function of (seed, position)
"""

SAYS = "prepare: "
"""Begins the lines of a job's log that tell how far `prepare` is."""
