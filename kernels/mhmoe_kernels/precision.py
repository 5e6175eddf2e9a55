"""In which precision sums are added up and scores compared."""

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """At least float32. Of two scores that bfloat16 cannot tell apart, one must still be the larger; and sums over
    experts in bfloat16 lose what routing learns from."""
    return x if x.dtype == torch.float64 else x.float()
