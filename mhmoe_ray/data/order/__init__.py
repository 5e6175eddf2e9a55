"""The order of samples.

mixture.py      the mixture weights of a spec
order.py        the sample at each position: a pure function of (seed, position)
interleaver.py  the domain of each slot of an endless sequence
permutation.py  the sample of each slot of a domain
rows.py         rows of images at the positions of a micro-batch with parts, and the held-out ones
"""
