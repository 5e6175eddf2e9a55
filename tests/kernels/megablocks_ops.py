"""Torch operators in place of MegaBlocks' compiled extension of this name, so that the rest runs without CUDA.

Only the operators that the backend calls are here: `csrc/sort.h`, `histogram.h` and `cumsum.h` of megablocks 0.10.0,
with their argument order, types and shapes.
"""

import torch


def sort(x, end_bit, x_out, iota_out):
    """Sort a vector stably by its low `end_bit` bits; write the sorted values and the places that they came from."""
    assert x.ndim == 1
    assert x_out.dtype == iota_out.dtype == x.dtype
    order = torch.argsort(x & ((1 << end_bit) - 1), stable=True)
    x_out.copy_(x[order])
    iota_out.copy_(order)


def histogram(x, num_bins):
    """Return how often each of 0..num_bins-1 occurs in a vector, in int32."""
    assert x.ndim == 1
    return torch.bincount(x, minlength=num_bins)[:num_bins].int()


def inclusive_cumsum(x, dim, out):
    """Write the sums of the first 1, 2, ... entries of each row into `out`."""
    assert x.ndim == out.ndim == 2
    assert x.dtype == out.dtype
    assert dim == 1
    out.copy_(torch.cumsum(x, 1))
