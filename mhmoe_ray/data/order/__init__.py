"""The order in which a training reads its samples.

mixture.py      the mixture weights of a spec
order.py        the sample at each position: a pure function of (seed, position)
interleaver.py  the domain of each slot in an endless sequence, in given proportions
permutation.py  the sample of each slot of a domain, shuffled anew in each epoch
"""
