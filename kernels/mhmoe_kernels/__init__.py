"""Kernels that run routed rows through experts. Torch only; this package knows nothing of heads, layers or processes.

Importing this package alone does not import torch: its names are loaded at their first use, so that the spec and the
planner can read abilities.py.

Shape suffixes, here and in mhmoe_ray.model:

    N  rows (tokens, or sub-tokens when h > 1)     D  width of a row (d, or d/h)
    K  experts per row (top-k)                     E  experts held here
    R  routed rows, N * K                          F  hidden width of an expert
    I  input width of a matrix                     O  output width of a matrix
    P  rows including a kernel's padding

    abilities.py        what each kernel can compute, without torch
    backends.py         the common interface: rows and their routes in, combined expert outputs per row out
    weights.py          a stack of experts
    permutation.py      sorting routes by expert and un-sorting them
    cpu.py              which instructions the CPU has
    reference.py        a readable reference for tests, and GShard's static routing for comparison
    grouped.py          each expert once on its contiguous rows, with hand-written backwards
    megablocks.py       MegaBlocks' sort, histogram and copies around a grouped GEMM; CUDA only
    packed.py           for inference on CPUs: a row's result does not depend on other rows
    triton/             experts as fused Triton kernels
    cpp/                experts as one fused kernel for CPUs
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mhmoe_kernels.backends import BACKENDS, choose, run_experts, run_sorted_experts, why_not
    from mhmoe_kernels.permutation import combine, permute, plan_routes, wide
    from mhmoe_kernels.weights import ExpertWeights, Function, GeluSubln, Swiglu

__all__ = [
    "BACKENDS",
    "ExpertWeights",
    "Function",
    "GeluSubln",
    "Swiglu",
    "choose",
    "combine",
    "permute",
    "plan_routes",
    "run_experts",
    "run_sorted_experts",
    "why_not",
    "wide",
]

_MODULES = ("backends", "permutation", "weights")


def __getattr__(name: str) -> Any:
    """Load a name of `__all__` from the module that defines it (PEP 562).

    Raises:
        AttributeError: `__all__` does not contain the name.
    """
    if name in __all__:
        for module in map(import_module, (f"{__name__}.{module}" for module in _MODULES)):
            if hasattr(module, name):
                globals()[name] = getattr(module, name)
                return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
