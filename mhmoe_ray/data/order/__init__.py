"""Which sample each place of a training reads: mixture.py has the rules of the spec, order.py the order."""
