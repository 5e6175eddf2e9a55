"""Kernels that run rows through the experts that a router chose. They know nothing of heads, layers or processes.

They require only torch; some of them also need Triton, MegaBlocks or a C++ compiler. A row is a token or a sub-token,
and a route is one choice of an expert by a row. The import of this package does not import torch: names are loaded at
first use, so that the spec and the planner can read abilities.py.

Shape suffixes, here and in mhmoe_ray.model:

    N  rows (tokens, or sub-tokens when h > 1)     D  width of a row (a token's, or a sub-token's)
    K  experts per row (top-k)                     E  experts of the stack
    R  routed rows, N * K                          F  hidden width of an expert
    I  input width of a matrix                     O  output width of a matrix
    P  rows including a kernel's padding           Z  rank of an adapter

    abilities.py        limits of each kernel, without torch
    choice.py           table of the kernels that `auto` chooses on GPUs, without torch
    backends.py         common interface: rows and routes in, combined expert outputs per row out
    weights.py          stack of experts
    permutation.py      sorting of routes by expert, and its inverse
    cpu.py              instruction level of the CPU
    reference.py        readable reference for tests, and GShard's static routing for comparison
    operators.py        kernels as operators of torch
    adapted.py          experts with frozen weights and low-rank adapters
    grouped/            each expert once on its contiguous rows, with hand-written backwards
    megablocks.py       MegaBlocks' sort, histogram and copies around a grouped GEMM; CUDA only
    packed.py           experts for inference on CPUs: a row's result does not depend on other rows
    triton/             experts as Triton kernels, fused or as grouped products, and a fused router
    cpp/                experts as one fused kernel for CPUs
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mhmoe_kernels.backends import (
        BACKENDS,
        allow_compilation,
        can_fuse_logits,
        can_fuse_routing,
        choose_kernel,
        plan_for_kernel,
        run_experts,
        run_sorted_experts,
        unavailable_reason,
    )
    from mhmoe_kernels.choice import TRITON_KERNELS
    from mhmoe_kernels.permutation import RoutePlan, add_routes, combine, permute, plan_routes, widen
    from mhmoe_kernels.triton import fused_logits, fused_routing, plan_received
    from mhmoe_kernels.weights import Adapted, ExpertWeights, Function, Gelu, GeluSubln, Swiglu

__all__ = [
    "BACKENDS",
    "TRITON_KERNELS",
    "Adapted",
    "ExpertWeights",
    "Function",
    "Gelu",
    "GeluSubln",
    "RoutePlan",
    "Swiglu",
    "add_routes",
    "allow_compilation",
    "can_fuse_logits",
    "can_fuse_routing",
    "choose_kernel",
    "combine",
    "fused_logits",
    "fused_routing",
    "permute",
    "plan_for_kernel",
    "plan_received",
    "plan_routes",
    "run_experts",
    "run_sorted_experts",
    "unavailable_reason",
    "widen",
]

_MODULES = ("choice", "backends", "permutation", "triton", "weights")


def __getattr__(name: str) -> Any:
    """Load a name of `__all__` from the module that defines it (PEP 562)."""
    if name in __all__:
        # The name is stored as a global, so that from then on Python finds it without this function.
        for module in map(import_module, (f"{__name__}.{module}" for module in _MODULES)):
            if hasattr(module, name):
                globals()[name] = getattr(module, name)
                return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
