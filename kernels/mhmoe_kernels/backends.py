"""The one seam: rows and their routes in, the experts' outputs combined per row out, differentiable both ways."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mhmoe_kernels import cpp, megablocks, triton
from mhmoe_kernels.abilities import KERNELS
from mhmoe_kernels.grouped import RunSorted, grouped, run_sorted
from mhmoe_kernels.packed import padded
from mhmoe_kernels.reference import capacity, reference
from mhmoe_kernels.weights import ExpertWeights


def _anywhere(device: torch.device) -> None:
    return None


class Backend(NamedTuple):
    run: Callable[..., Tensor]
    """(x_ND, expert_NK, gate_NK, weights) -> y_ND."""
    why_not: Callable[[torch.device], str | None] = _anywhere
    """Why it cannot run on this device here, in one line; None where it can."""
    run_sorted: RunSorted | None = None
    """The same for rows that are sorted by expert, where it sorts them itself."""
    trains: bool = True
    """Whether it has a backward."""


BACKENDS: dict[str, Backend] = {
    "reference": Backend(reference),
    "grouped": Backend(grouped, run_sorted=run_sorted),
    "cpp": Backend(cpp.run, cpp.why_not, cpp.run_sorted),
    "padded": Backend(padded, trains=False),
    "capacity": Backend(capacity),
    "triton": Backend(triton.run, triton.why_not),
    "megablocks": Backend(megablocks.run, megablocks.why_not),
}

STATIC = {name for name, abilities in KERNELS.items() if abilities.is_static}
"""Backends whose `run` is also told the places of an expert."""
FUSED_UP_TO = KERNELS["triton"].auto_widest_row or 0


def why_not(name: str, device: torch.device) -> str | None:
    """Why a backend cannot run on a device here, in one line; None where it can, as `auto` always does."""
    return None if name == "auto" else BACKENDS[name].why_not(device)


def choose(name: str, x_ND: Tensor, weights: ExpertWeights, places: int | None = None) -> str:
    """The backend that a name means: a key of `BACKENDS`, or `auto` for what should be fastest here. Where nothing is
    dropped, one of static routing has no layout, and means `auto`.

    Args:
        name: as in `MoESpec.kernel`.
        x_ND: rows, in the dtype that experts get them in.
        weights: the experts.
        places: as in `run_experts`.
    """
    if name != "auto" and (places is not None or name not in STATIC):
        return name
    if x_ND.device.type == "cuda":
        # In float32 its products are not the matrix units'.
        suits = x_ND.shape[1] <= FUSED_UP_TO and x_ND.dtype == torch.bfloat16
        fused = suits and triton.why_not(x_ND.device) is None
        return "triton" if fused else "grouped"
    return "cpp" if cpp.is_ahead(x_ND, weights) else "grouped"


def run_experts(
    backend: str, x_ND: Tensor, expert_NK: Tensor, gate_NK: Tensor, weights: ExpertWeights, places: int | None = None
) -> Tensor:
    """y_n = sum_k gate_nk * expert_{expert_nk}(x_n), for experts of any kind (P2, section 2.1).

    Args:
        backend: a key of `BACKENDS`.
        x_ND: rows.
        expert_NK: int64, the K different experts of each row, each in 0..E-1.
        gate_NK: routing weights, in the dtype of x or float32; 0 for a route that was dropped.
        weights: the E experts.
        places: rows that an expert takes at most, where routing is static; for a backend in `STATIC`.

    Returns:
        y_ND in the dtype of x. Every route is computed, dropped ones with weight 0, but for `capacity`. N may be 0,
        and experts may get no rows; both still take part in the backward pass, which expert parallelism relies on;
        a backend that does not train (`Backend.trains`) has none.
    """
    more = {"places": places} if backend in STATIC else {}
    with _as_given(x_ND):
        return BACKENDS[backend].run(x_ND, expert_NK, gate_NK, weights, **more)


def run_sorted_experts(backend: str, x_RD: Tensor, counts: list[int], weights: ExpertWeights) -> Tensor:
    """Each row through its one expert, for rows that are sorted by expert.

    Args:
        backend: a key of `BACKENDS`.
        x_RD: rows; the first counts[0] belong to expert 0, and so on.
        counts: rows per expert, adding up to R.
        weights: the E experts.

    Returns:
        y_RD. As in `run_experts`, R may be 0, and experts may get no rows.
    """
    if (ready := BACKENDS[backend].run_sorted) is not None:
        with _as_given(x_RD):
            return ready(x_RD, counts, weights)
    # The others take routes and sort them again. For `triton` these are R numbers: it reads rows where they lie.
    expert_E = torch.arange(len(counts), device=x_RD.device)
    count_E = torch.tensor(counts, pin_memory=x_RD.is_cuda).to(x_RD.device, non_blocking=True)  # the host goes on
    expert_R = expert_E.repeat_interleave(count_E, output_size=len(x_RD))
    one_R1 = torch.ones(len(x_RD), 1, dtype=torch.float32, device=x_RD.device)
    return run_experts(backend, x_RD, expert_R[:, None], one_R1, weights)


def _as_given(x: Tensor) -> torch.autocast:
    """Autocast is the caller's, whose tensors have its dtype by now. In here it would round what is float32 on purpose,
    and widen what is to stay narrow: of norms on CUDA, for one, whose results meet bfloat16 weights next."""
    return torch.autocast(x.device.type, enabled=False)
