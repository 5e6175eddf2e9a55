"""The sample at each position of a training: mixture.py computes the mixture weights of a spec, order.py the order."""
