"""SwiGLU experts in bfloat16 as one fused C++ kernel for CPUs.

The hidden layer stays in the cache, forward and backward. The kernel is compiled at its first use, in two seconds, if
the machine has a compiler. The base install needs none.

    build.py      compilation of this folder's kernels for the CPU
    autograd.py   the kernels as a torch autograd function
    swiglu.cpp    the loop over experts and their rows, forward and backward
    transpose.h   layouts of its matrices
"""

import torch
from torch import Tensor

from mhmoe_kernels.abilities import KERNELS
from mhmoe_kernels.cpp.build import BuildError, library
from mhmoe_kernels.cpu import CpuLevel, cpu_level
from mhmoe_kernels.grouped import sort_and_run
from mhmoe_kernels.weights import ExpertWeights


def unavailable_reason(device: torch.device) -> str | None:
    """Return the reason why `run` cannot run on `device`, in one line; None if it can."""
    if device.type != "cpu":
        return f"kernel cpp is for CPUs, and this is {device.type}"
    try:
        library()
    except BuildError as error:
        return str(error)
    return None


def is_faster(x_ND: Tensor, weights: ExpertWeights) -> bool:
    """Return whether this kernel can compute these rows and experts here, and is faster than `grouped`.

    It is faster on CPUs with AMX; kernels/README.md has the measurements.
    """
    has_amx = x_ND.device.type == "cpu" and cpu_level() >= CpuLevel.AMX
    return has_amx and _unsupported_error(x_ND, weights) is None and unavailable_reason(x_ND.device) is None


def run(x_ND: Tensor, expert_NK: Tensor, gate_NK: Tensor, weights: ExpertWeights) -> Tensor:
    """Run routed rows through experts, as `mhmoe_kernels.run_experts` does; `run_sorted` lists the errors."""
    return sort_and_run(run_sorted, x_ND, expert_NK, gate_NK, weights)


def run_sorted(x_RD: Tensor, counts: list[int], weights: ExpertWeights) -> Tensor:
    """Run rows that are sorted by expert through their experts.

    Args:
        x_RD: rows; the first counts[0] belong to expert 0, and so on.
        counts: number of rows per expert; their sum is R.
        weights: the experts, len(counts) of them.

    Raises:
        ValueError: the kernel does not compute these experts or sizes.
        TypeError: rows or weights are not bfloat16.
        RuntimeError: `unavailable_reason` gives a reason.
    """
    # An unsupported problem is reported before an unsupported machine: another machine would not help.
    if error := _unsupported_error(x_RD, weights):
        raise error
    if reason := unavailable_reason(x_RD.device):
        raise RuntimeError(reason)
    from mhmoe_kernels.cpp.autograd import swiglu_sorted

    gate_EFD, up_EFD, down_EDF = weights.stacked
    return swiglu_sorted(x_RD, counts, gate_EFD, up_EFD, down_EDF)


def _unsupported_error(x_ND: Tensor, weights: ExpertWeights) -> Exception | None:
    """Return the error for a kind of experts, a dtype or sizes that the kernel does not compute; None if it does."""
    # `is_faster` only asks for the error, so it is returned, not raised.
    limits = KERNELS["cpp"]
    if weights.function.name != limits.function:
        return ValueError("kernel cpp computes SwiGLU experts only")
    if {str(t.dtype) for t in (x_ND, *weights.stacked)} != {f"torch.{limits.precision}"}:
        return TypeError("kernel cpp computes in bfloat16 only")
    _, F, D = weights.stacked[0].shape
    if D % limits.size_multiple or F % limits.size_multiple:
        return ValueError(f"kernel cpp takes even sizes only: rows are {D} wide, experts {F}")
    return None
