"""The common interface of all kernels: rows and their routes in, combined expert outputs per row out, with
gradients."""

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
    """Function (x_ND, expert_NK, gate_NK, weights) -> y_ND."""
    why_not: Callable[[torch.device], str | None] = _anywhere
    """Function that returns in one line why the backend cannot run on a device of this machine, or None if it can."""
    run_sorted: RunSorted | None = None
    """Function for rows that are already sorted by expert, if the backend sorts rows itself."""
    trains: bool = True
    """Whether the backend has a backward."""


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
"""Names of the backends whose `run` also takes the expert capacity (`places`)."""
FUSED_UP_TO = KERNELS["triton"].auto_widest_row or 0


def why_not(name: str, device: torch.device) -> str | None:
    """Return in one line why a backend cannot run on a device of this machine; None if it can, as `auto` always can."""
    return None if name == "auto" else BACKENDS[name].why_not(device)


def choose(name: str, x_ND: Tensor, weights: ExpertWeights, places: int | None = None) -> str:
    """Return the key of `BACKENDS` that a kernel name selects; `auto` selects the one that should be fastest here.

    If nothing is dropped (`places` is None), a backend of static routing has no layout and is treated as `auto`.

    Args:
        name: kernel name as in `MoESpec.kernel`.
        x_ND: rows, in the dtype in which experts get them.
        weights: the experts.
        places: expert capacity as in `run_experts`.
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
    """Return y_n = sum_k gate_nk * expert_{expert_nk}(x_n), for experts of any kind (P2, section 2.1).

    Args:
        backend: a key of `BACKENDS`.
        x_ND: the rows.
        expert_NK: the K different experts of each row, int64, each in 0..E-1.
        gate_NK: gates (routing weights), in the dtype of x or float32; 0 for a dropped route.
        weights: the E experts.
        places: expert capacity in rows if routing is static; used by the backends in `STATIC`.

    Returns:
        y_ND in the dtype of x. All backends but `capacity` compute every route, dropped ones with gate 0. N may be 0,
            and experts may get no rows; both still take part in the backward pass, which expert parallelism relies on.
            A backend that does not train (`Backend.trains`) has no backward.
    """
    more = {"places": places} if backend in STATIC else {}
    with _as_given(x_ND):
        return BACKENDS[backend].run(x_ND, expert_NK, gate_NK, weights, **more)


def run_sorted_experts(backend: str, x_RD: Tensor, counts: list[int], weights: ExpertWeights) -> Tensor:
    """Run rows that are sorted by expert through their experts, one expert per row.

    Args:
        backend: a key of `BACKENDS`.
        x_RD: rows; the first counts[0] belong to expert 0, and so on.
        counts: number of rows per expert; their sum is R.
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
    """Return a context that disables autocast inside kernels.

    The caller has applied autocast: the tensors already have its dtype. Inside a kernel, autocast would round values
    that are float32 on purpose, and widen values that must stay narrow, for example the results of norms on CUDA, which
    meet bfloat16 weights next.
    """
    return torch.autocast(x.device.type, enabled=False)
