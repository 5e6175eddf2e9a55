"""SwiGLU experts in bfloat16 as one fused kernel for CPUs, in C++: the hidden layer stays in the cache, both ways.

The kernel is compiled where it first runs, in two seconds, if there is a compiler. The base install does not need one.

    build.py      compilation of this folder's kernels for the CPU
    autograd.py   the kernels as a torch autograd function
    swiglu.cpp    the walk over experts and their rows, forward and backward
    transpose.h   layouts of its matrices
"""

import torch
from torch import Tensor

from mhmoe_kernels.abilities import KERNELS
from mhmoe_kernels.cpp.build import BuildError, library
from mhmoe_kernels.cpu import CpuLevel, cpu_level
from mhmoe_kernels.grouped import sort_first
from mhmoe_kernels.weights import ExpertWeights


def why_not(device: torch.device) -> str | None:
    """Return in one line why `run` cannot run on `device`; None if it can."""
    if device.type != "cpu":
        return f"kernel cpp is for CPUs, and this is {device.type}"
    try:
        library()
    except BuildError as error:
        return str(error)
    return None


def is_ahead(x_ND: Tensor, weights: ExpertWeights) -> bool:
    """Whether this kernel is faster than `grouped` for these rows and experts (measured: kernels/README.md): on CPUs
    with AMX, if it supports them."""
    amx = x_ND.device.type == "cpu" and cpu_level() >= CpuLevel.AMX
    return amx and _refusal(x_ND, weights) is None and why_not(x_ND.device) is None


def run(x_ND: Tensor, expert_NK: Tensor, gate_NK: Tensor, weights: ExpertWeights) -> Tensor:
    """Run routed rows through experts: see `mhmoe_kernels.run_experts`, and `run_sorted` for what is raised."""
    return sort_first(run_sorted, x_ND, expert_NK, gate_NK, weights)


def run_sorted(x_RD: Tensor, counts: list[int], weights: ExpertWeights) -> Tensor:
    """Run rows that are sorted by expert through their experts.

    Args:
        x_RD: rows; the first counts[0] belong to expert 0, and so on.
        counts: number of rows per expert; their sum is R.
        weights: the experts, len(counts) of them.

    Raises:
        ValueError: the kernel does not compute these experts or sizes.
        TypeError: rows or weights are not bfloat16.
        RuntimeError: `why_not` gives a reason.
    """
    # What it computes nowhere comes first: another machine would not help.
    if error := _refusal(x_RD, weights):
        raise error
    if reason := why_not(x_RD.device):
        raise RuntimeError(reason)
    from mhmoe_kernels.cpp.autograd import swiglu_sorted

    gate_EFD, up_EFD, down_EDF = weights.stacked
    return swiglu_sorted(x_RD, counts, gate_EFD, up_EFD, down_EDF)


def _refusal(x_ND: Tensor, weights: ExpertWeights) -> Exception | None:
    limits = KERNELS["cpp"]
    if weights.function.name != limits.function:
        return ValueError("kernel cpp computes SwiGLU experts only")
    if {str(t.dtype) for t in (x_ND, *weights.stacked)} != {f"torch.{limits.precision}"}:
        return TypeError("kernel cpp computes in bfloat16 only")
    _, F, D = weights.stacked[0].shape
    if D % limits.sizes or F % limits.sizes:
        return ValueError(f"kernel cpp takes even sizes only: rows are {D} wide, experts {F}")
    return None
