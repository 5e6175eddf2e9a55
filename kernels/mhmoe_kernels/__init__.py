"""How routed rows go through experts. Torch only; knows nothing of heads, layers or processes.

Importing this package alone loads no torch: its names are loaded at their first use, so that the spec and the planner
can read abilities.py.

Shape suffixes, here and in mhmoe_ray.model:

    N  rows (tokens, or sub-tokens when h > 1)     D  width of a row (d, or d/h)
    K  experts per row (top-k)                     E  experts held here
    R  routed rows, N * K                          F  hidden width of an expert
    I  values that a matrix takes                  O  values that it gives
    P  rows with the room that a kernel adds to them

    abilities.py        what each kernel can compute, without torch
    backends.py         the one seam: rows and their routes in, the experts' outputs combined per row out
    weights.py          a stack of experts
    permutation.py      sorting routes by expert and bringing them back
    cpu.py              what the CPU at hand can compute
    reference.py        the oracle, written to be read, and GShard's static routing, to be compared with
    grouped.py          each expert once on its contiguous rows, with backwards by hand
    megablocks.py       MegaBlocks' sort, histogram and copies around a grouped GEMM; CUDA only
    packed.py           for inference on CPUs: what a row gives depends on no other
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
    """Load a name of `__all__` from the module that has it (PEP 562)."""
    if name in __all__:
        for module in map(import_module, (f"{__name__}.{module}" for module in _MODULES)):
            if hasattr(module, name):
                globals()[name] = getattr(module, name)
                return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
