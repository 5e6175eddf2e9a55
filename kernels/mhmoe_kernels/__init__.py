"""How routed rows go through experts. Torch only; knows nothing of heads, layers or processes.

Shape suffixes, here and in mhmoe_ray.model:

    N  rows (tokens, or sub-tokens when h > 1)     D  width of a row (d, or d/h)
    K  experts per row (top-k)                     E  experts held here
    R  routed rows, N * K                          F  hidden width of an expert
    I  values that a matrix takes                  O  values that it gives
    P  rows with the room that a kernel adds to them
"""

from mhmoe_kernels.permute import combine, permute, plan_routes
from mhmoe_kernels.precision import wide
from mhmoe_kernels.seam import BACKENDS, choose, run_experts, run_sorted_experts, why_not
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
