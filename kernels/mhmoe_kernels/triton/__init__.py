"""Experts as Triton kernels, fused or as grouped products. The host never waits for a GPU.

This module imports Triton at the first use, because the base install does not include it.

    operators.py   kernels as operators of torch; routes and rows
    sort.py        stable sort of routes by expert, divided into tiles
    rows.py        gather of rows, and the weighted sum of each row's routes
    fused/         an expert as one kernel: the hidden layer is never in memory
    grouped/       experts as grouped products of any width, with small kernels between them
    resources.py   resources of each compiled kernel, without a GPU
"""

import os
from functools import cache
from importlib.util import find_spec
from shutil import which

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from mhmoe_kernels.weights import ExpertWeights

SHARED_BYTES = 120 << 10
"""Bytes of shared memory per block that the kernels need.

Compiled for cards before sm_90, the kernels of some widths take as much. Consumer cards have 99 KiB.
"""


def unavailable_reason(device: torch.device) -> str | None:
    """Return the reason why `run` cannot run on `device`, in one line; None if it can."""
    if find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    is_interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes")
    if device.type != "cuda" and not is_interpreted:
        return f"triton compiles for CUDA devices, and this is {device.type}; TRITON_INTERPRET=1 runs it here, slowly"
    if not is_interpreted and not _has_compiler(os.environ.get("CC"), os.environ.get("PATH")):
        return "triton needs a C compiler for its kernel launchers, and there is neither gcc nor clang: install one"
    if not is_interpreted and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(device)
        # AMD's cards do not have this property, so for them the check passes.
        shared_bytes = getattr(properties, "shared_memory_per_block_optin", SHARED_BYTES)
        if shared_bytes < SHARED_BYTES:
            return (
                f"kernel triton needs {SHARED_BYTES >> 10} KiB of shared memory, and this GPU has {shared_bytes >> 10}"
            )
    return None


@cache
def _has_compiler(compiler: str | None, path: str | None) -> bool:
    """Return whether there is a C compiler where Triton looks for one: in CC, then gcc and clang in PATH.

    Args:
        compiler: value of the environment variable CC.
        path: value of the environment variable PATH.
    """
    return bool(compiler or which("gcc", path=path) or which("clang", path=path))


def run_fused(x_ND: Tensor, expert_NK: Tensor, gate_NK: Tensor, weights: ExpertWeights) -> Tensor:
    """Run routed rows through fused experts, as `mhmoe_kernels.run_experts` does, in float32 or bfloat16.

    Sums are computed in float32 and are bitwise reproducible.

    Raises:
        TypeError: the kernels do not compute in this dtype, or dtypes are mixed.
        RuntimeError: `unavailable_reason` gives a reason.
    """
    _check(x_ND, weights)
    from mhmoe_kernels.triton.fused.experts import run

    with torch.cuda.device_of(x_ND):  # type: ignore[no-untyped-call]  # torch has no types for it
        return run(x_ND, expert_NK, gate_NK, weights)


def run_grouped(x_ND: Tensor, expert_NK: Tensor, gate_NK: Tensor, weights: ExpertWeights) -> Tensor:
    """Run routed rows through experts by grouped products; arguments, result and errors are those of `run_fused`."""
    _check(x_ND, weights)
    from mhmoe_kernels.triton.grouped.experts import run

    with torch.cuda.device_of(x_ND):  # type: ignore[no-untyped-call]  # torch has no types for it
        return run(x_ND, expert_NK, gate_NK, weights)


def run_sorted_grouped(x_RD: Tensor, counts: list[int], weights: ExpertWeights) -> Tensor:
    """Run rows that are sorted by expert through experts by grouped products, as `mhmoe_kernels.run_sorted_experts`
    does. Errors are those of `run_fused`."""
    _check(x_RD, weights)
    from mhmoe_kernels.triton.grouped.experts import run_sorted

    with torch.cuda.device_of(x_RD):  # type: ignore[no-untyped-call]  # torch has no types for it
        return run_sorted(x_RD, counts, weights)


def _check(x_ND: Tensor, weights: ExpertWeights) -> None:
    # An unsupported dtype is reported before an unsupported machine: another machine would not help.
    if {x_ND.dtype, *(w.dtype for w in weights.stacked)} not in ({torch.float32}, {torch.bfloat16}):
        raise TypeError(f"rows and weights must all be float32 or all bfloat16, not {x_ND.dtype} and others")
    # A fake tensor has no device that could lack anything.
    if not is_fake(x_ND) and (reason := unavailable_reason(x_ND.device)):
        raise RuntimeError(reason)
