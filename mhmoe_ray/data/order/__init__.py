"""The order of samples: mixture.py computes the mixture weights of a spec, order.py the sample at each position."""
