"""Which sample each place of a training reads.

mixture.py has the rules of the spec, apportion.py their rounding; order.py joins interleave.py, which domain comes
next, and permutation.py, which of its samples.
"""
