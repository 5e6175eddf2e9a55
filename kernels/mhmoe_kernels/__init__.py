"""How routed rows go through experts. Torch only; knows nothing of heads, layers or processes.

Shape suffixes, here and in mhmoe_ray.model:

    N  rows (tokens, or sub-tokens when h > 1)     D  width of a row (d, or d/h)
    K  experts per row (top-k)                     E  experts held here
    R  routed rows, N * K                          F  hidden width of an expert
    I  values that a matrix takes                  O  values that it gives
    P  rows with the room that a kernel adds to them

    backends.py         the one seam: rows and their routes in, the experts' outputs combined per row out
    weights.py          a stack of experts
    permute.py          sorting routes by expert and bringing them back
    cpu.py              what the CPU at hand can compute
    reference.py        the oracle, written to be read, and GShard's static routing, to be compared with
    grouped.py          each expert once on its contiguous rows, with backwards by hand
    megablocks.py       MegaBlocks' sort, histogram and copies around a grouped GEMM; CUDA only
    packed.py           for inference on CPUs: what a row gives depends on no other
    triton/             experts as fused Triton kernels
    cpp/                experts as one fused kernel for CPUs
"""

from mhmoe_kernels.backends import BACKENDS, choose, run_experts, run_sorted_experts, why_not
from mhmoe_kernels.permute import combine, permute, plan_routes, wide
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
