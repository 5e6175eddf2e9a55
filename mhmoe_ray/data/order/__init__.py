"""Which sample each place of a training reads.

mixture.py has the rules of the spec; order.py says which domain comes next, and order.py which of its samples.
"""
