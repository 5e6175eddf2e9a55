"""Which sample each place of a training reads.

mixture.py has the rules of the spec, mixture.py their rounding; order.py joins order.py, which domain comes
next, and permutation.py, which of its samples.
"""
