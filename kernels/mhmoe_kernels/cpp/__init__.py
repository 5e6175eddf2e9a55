"""SwiGLU experts in bfloat16 as one fused C++ kernel for CPUs.

The hidden layer stays in the cache. The kernel is compiled at its first use, in two seconds, if the machine has a
compiler.

    build.py      compilation of this folder's kernels for the CPU
    operators.py  the kernels as operators of torch
    swiglu.cpp    the loop over experts and their rows, forward and backward
    transpose.h   layouts of its matrices
"""

import torch
from torch import Tensor

from mhmoe_kernels.abilities import KERNELS
from mhmoe_kernels.choice import ExpertSizes, limit_reason
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


def is_faster(sizes: ExpertSizes) -> bool:
    """Return whether this kernel suits these experts and beats `grouped`, on CPUs with AMX (kernels/README.md)."""
    is_suitable = cpu_level() >= CpuLevel.AMX and limit_reason("cpp", sizes) is None
    return is_suitable and unavailable_reason(torch.device("cpu")) is None


def run(x_ND: Tensor, expert_NK: Tensor, gate_NK: Tensor, weights: ExpertWeights) -> Tensor:
    """Run routed rows through experts, as `mhmoe_kernels.run_experts` does; errors are those of `run_sorted`."""
    return sort_and_run(run_sorted, x_ND, expert_NK, gate_NK, weights)


def run_sorted(x_RD: Tensor, count_E: Tensor, weights: ExpertWeights) -> Tensor:
    """Run rows that are sorted by expert through experts; `count_E` is int64 in CPU memory.

    Other experts or sizes raise ValueError, dtypes other than bfloat16 TypeError, an `unavailable_reason` RuntimeError.
    """
    _check(x_RD, weights)
    from mhmoe_kernels.cpp.operators import CPP_SWIGLU

    return CPP_SWIGLU(x_RD.contiguous(), count_E, (), tuple(w.contiguous() for w in weights.stacked))


def _check(x_RD: Tensor, weights: ExpertWeights) -> None:
    # Unsupported experts are reported before an unsupported machine, because another machine would not help.
    limits = KERNELS["cpp"]
    if weights.function.name not in (limits.functions or ()):
        raise ValueError("kernel cpp computes SwiGLU experts only")
    if {t.dtype for t in (x_RD, *weights.stacked)} != {torch.bfloat16}:
        raise TypeError("kernel cpp computes in bfloat16 only")
    _, F, D = weights.stacked[0].shape
    if D % limits.size_multiple or F % limits.size_multiple:
        raise ValueError(f"kernel cpp takes even sizes only: rows are {D} wide, experts {F}")
    if reason := unavailable_reason(x_RD.device):
        raise RuntimeError(reason)
