"""Experts as fused Triton kernels: the hidden layer stays on the chip, forward and backward.

Nothing here imports Triton before it is used, because the base install does not include it.

    autograd.py    experts between routed rows and combined output, as an autograd function
    launch.py      the three kernels of each kind of expert behind one set of calls
    swiglu.py      SwiGLU experts on sorted rows
    gelu.py        GELU experts with biases and an inner norm
    combine.py     un-permute: gather a row's routes, weight and add them
    chunks.py      tiles of rows as chunks whose widths are powers of two
    schedule.py    assignment of rows to programs
    blocks.py      block sizes for sm_90
    resources.py   resources of each compiled kernel, without a GPU
"""

import os
from functools import cache
from importlib.util import find_spec
from shutil import which

import torch
from torch import Tensor

from mhmoe_kernels.weights import ExpertWeights

SHARED_BYTES = 120 << 10
"""Bytes of shared memory per block that some widths take on cards before sm_90 (by compiling for them); consumer cards
have 99 KiB."""


def why_not(device: torch.device) -> str | None:
    """Return in one line why `run` cannot run on `device`; None if it can."""
    if find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes")
    if device.type != "cuda" and not interpreted:
        return f"triton compiles for CUDA devices, and this is {device.type}; TRITON_INTERPRET=1 runs it here, slowly"
    if not interpreted and not _has_compiler(os.environ.get("CC"), os.environ.get("PATH")):
        return "triton needs a C compiler for what launches its kernels, and there is neither gcc nor clang"
    if not interpreted and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(device)
        there = getattr(properties, "shared_memory_per_block_optin", SHARED_BYTES)  # AMD's have none
        if there < SHARED_BYTES:
            return f"kernel triton needs {SHARED_BYTES >> 10} KiB of shared memory, and this GPU has {there >> 10}"
    return None


@cache
def _has_compiler(named: str | None, path: str | None) -> bool:
    """Return whether there is a C compiler, searched for in the way of Triton."""
    return bool(named or which("gcc", path=path) or which("clang", path=path))


def run(x_ND: Tensor, expert_NK: Tensor, gate_NK: Tensor, weights: ExpertWeights) -> Tensor:
    """Run routed rows through experts: see `mhmoe_kernels.run_experts`. The dtype is float32 or bfloat16; sums are
    float32, and bitwise reproducible.

    Raises:
        TypeError: no kernel here computes the dtype, or dtypes are mixed.
        RuntimeError: `why_not` gives a reason.
    """
    # What it computes nowhere comes first: another machine would not help.
    if {x_ND.dtype, *(w.dtype for w in weights.stacked)} not in ({torch.float32}, {torch.bfloat16}):
        raise TypeError(f"rows and weights must all be float32 or all bfloat16, not {x_ND.dtype} and others")
    if reason := why_not(x_ND.device):
        raise RuntimeError(reason)
    from mhmoe_kernels.triton.autograd import fused_experts
    from mhmoe_kernels.triton.launch import kind_of
    from mhmoe_kernels.triton.schedule import sort_routes

    kind = kind_of(weights.function)
    with torch.cuda.device_of(x_ND):  # type: ignore[no-untyped-call]  # torch has no types for it
        routes = sort_routes(expert_NK, len(weights.stacked[0]))
        return fused_experts(kind, x_ND, gate_NK, weights.stacked, routes)
