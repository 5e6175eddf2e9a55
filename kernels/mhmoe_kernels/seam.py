"""The one seam: rows and their routes in, the experts' outputs combined per row out, differentiable both ways."""

from collections.abc import Callable

from torch import Tensor

from mhmoe_kernels.grouped import grouped
from mhmoe_kernels.reference import reference
from mhmoe_kernels.triton import run as fused
from mhmoe_kernels.weights import ExpertWeights

Backend = Callable[[Tensor, Tensor, Tensor, ExpertWeights], Tensor]

BACKENDS: dict[str, Backend] = {"reference": reference, "grouped": grouped, "triton": fused}


def run_experts(backend: str, x_ND: Tensor, expert_NK: Tensor, gate_NK: Tensor, weights: ExpertWeights) -> Tensor:
    """y_n = sum_k gate_nk * expert_{expert_nk}(x_n), for experts of any kind (P2, section 2.1).

    Args:
        backend: a key of `BACKENDS`.
        x_ND: rows.
        expert_NK: int64, the K different experts of each row, each in 0..E-1.
        gate_NK: routing weights, in the dtype of x or float32.
        weights: the E experts.

    Returns:
        y_ND in the dtype of x. Dropless: every route is computed. N may be 0, and experts may get no rows; both still
        take part in the backward pass, which expert parallelism relies on.
    """
    return BACKENDS[backend](x_ND, expert_NK, gate_NK, weights)
