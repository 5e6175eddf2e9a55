"""Torch substitute for MegaBlocks' compiled extension of the same name, so that MegaBlocks runs without CUDA.

It has only the operators that the backend calls, with the argument order, types and shapes of `csrc/sort.h`,
`histogram.h` and `cumsum.h` of megablocks 0.10.0.
"""

import torch


def sort(x, end_bit, x_out, iota_out):
    """Sort a vector stably by its low `end_bit` bits; write the sorted values into `x_out` and their original positions
    into `iota_out`."""
    assert x.ndim == 1
    assert x_out.dtype == iota_out.dtype == x.dtype
    order = torch.argsort(x & ((1 << end_bit) - 1), stable=True)
    x_out.copy_(x[order])
    iota_out.copy_(order)


def histogram(x, num_bins):
    """Return how often each of the values 0 to num_bins - 1 occurs in a vector, as int32."""
    assert x.ndim == 1
    return torch.bincount(x, minlength=num_bins)[:num_bins].int()


def inclusive_cumsum(x, dim, out):
    """Write the running sums along each row of the matrix `x` into `out`; `dim` has to be 1."""
    assert x.ndim == out.ndim == 2
    assert x.dtype == out.dtype
    assert dim == 1
    out.copy_(torch.cumsum(x, 1))
