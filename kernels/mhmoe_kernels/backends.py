"""Common interface of all kernels: rows and routes in, combined expert outputs out, with gradients."""

from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mhmoe_kernels import adapted, cpp, megablocks, triton
from mhmoe_kernels.abilities import KERNELS
from mhmoe_kernels.choice import TRITON_KERNELS, ExpertSizes, Purpose, gpu_kernels, limit_reason
from mhmoe_kernels.grouped import RunSorted, run_grouped, run_sorted
from mhmoe_kernels.permutation import Plan, copy_to_device, plan_routes
from mhmoe_kernels.reference import run_capacity, run_reference
from mhmoe_kernels.weights import Adapted, ExpertWeights

if TYPE_CHECKING:
    from mhmoe_kernels.triton.operators import SortedRoutes


def _always_available(device: torch.device) -> None:
    return None


def _never_refused(device: torch.device, sizes: ExpertSizes) -> None:
    return None


class Backend(NamedTuple):
    """Kernel of experts with its abilities and the conditions under which it can run."""

    run: Callable[..., Tensor]
    """(x_ND, expert_NK, gate_NK, weights) -> y_ND, as in `run_experts`."""
    unavailable_reason: Callable[[torch.device], str | None] = _always_available
    """Reason why the backend cannot run on a device of this machine, in one line; None if it can."""
    run_sorted: RunSorted | None = None
    """(x_RD, count_E, weights) -> y_RD for rows that are sorted by expert."""
    refusal: Callable[[torch.device, ExpertSizes], str | None] = _never_refused
    """Reason why the backend cannot compute experts of these sizes on a device that it and its limits allow, in one
    line."""


BACKENDS: dict[str, Backend] = {
    "reference": Backend(run_reference),
    "grouped": Backend(run_grouped, run_sorted=run_sorted),
    "adapted": Backend(adapted.run_adapted, run_sorted=adapted.run_sorted),
    "cpp": Backend(cpp.run, cpp.unavailable_reason, cpp.run_sorted),
    "capacity": Backend(run_capacity),
    "triton": Backend(triton.run_fused, triton.unavailable_reason, refusal=triton.fused_refusal),
    "grouped_gemm": Backend(triton.run_grouped, triton.unavailable_reason),
    "grouped_mm": Backend(
        partial(triton.run_grouped, use_torch=True), triton.unavailable_reason, refusal=triton.grouped_mm_refusal
    ),
    "megablocks": Backend(megablocks.run, megablocks.unavailable_reason),
}

STATIC_BACKENDS = {name for name, limits in KERNELS.items() if limits.is_static}
"""Backends of static routing, whose `run` also takes `expert_capacity`."""


def unavailable_reason(name: str, device: torch.device, sizes: ExpertSizes | None = None) -> str | None:
    """Return in one line why a backend (or `auto`) cannot run on a device of this machine; None if it can.

    Without `sizes`, only the device is checked.
    """
    if name == "auto":
        return None
    reason = BACKENDS[name].unavailable_reason(device)
    if reason or sizes is None:
        return reason
    # `adapted` is no kernel that a spec can name, so the table of limits (`KERNELS`) lacks it.
    limits_reason = next((limit_reason(kernel, sizes) for kernel in KERNELS if kernel == name), None)
    return limits_reason or BACKENDS[name].refusal(device, sizes)


def expert_sizes(x_ND: Tensor, weights: ExpertWeights) -> ExpertSizes:
    """Return the sizes of rows and experts by which a kernel is chosen."""
    dtype = str(x_ND.dtype).removeprefix("torch.")
    experts, hidden = weights.stacked[0].shape[:2]
    return ExpertSizes(weights.function.name, dtype, x_ND.shape[1], hidden, experts)


def _choose_for_device(purpose: Purpose, device: torch.device, *size_fields: Any) -> str:
    # torch.compile treats the result as a constant (see `allow_compilation`), which needs plain values as arguments. So
    # the fields of the sizes are separate arguments.
    sizes = ExpertSizes(*size_fields)
    if device.type == "cuda":
        return _choose_gpu_kernel(purpose, device, sizes)
    return "cpp" if device.type == "cpu" and cpp.is_faster(sizes) else "grouped"


@cache
def _choose_gpu_kernel(purpose: Purpose, device: torch.device, sizes: ExpertSizes) -> str:
    major, _ = torch.cuda.get_device_capability(device)
    candidates = gpu_kernels(purpose, major, sizes)
    return next(kernel for kernel in candidates if unavailable_reason(kernel, device, sizes) is None)


def allow_compilation() -> None:
    """Let torch.compile treat the choice of a kernel and the check that it can run as constants."""
    # `assume_constant_result` is not used as a decorator, because this module's import would then load torch's
    # compiler, which takes seconds.
    for function in (_choose_for_device, cpp.unavailable_reason, triton.unavailable_reason):
        torch.compiler.assume_constant_result(function)  # type: ignore[no-untyped-call]


def choose_kernel(name: str, x_ND: Tensor, weights: ExpertWeights, expert_capacity: int | None = None) -> str:
    """Return the key of `BACKENDS` for a name as in `MoESpec.kernel`; `auto` is the kernel that should be fastest here.

    Static routing without a capacity is treated as `auto`. `x_ND` has the dtype in which experts get rows.
    """
    if isinstance(weights.function, Adapted):
        return "adapted"
    if name != "auto" and (expert_capacity is not None or name not in STATIC_BACKENDS):
        return name
    purpose: Purpose = "training" if torch.is_grad_enabled() else "inference"
    return _choose_for_device(purpose, x_ND.device, *expert_sizes(x_ND, weights))


def run_experts(
    backend: str,
    x_ND: Tensor,
    expert_NK: "Tensor | SortedRoutes",
    gate_NK: Tensor,
    weights: ExpertWeights,
    expert_capacity: int | None = None,
) -> Tensor:
    """Run rows through their experts, y_n = sum_k gate_nk * expert_{expert_nk}(x_n) (arXiv 2411.16205, section 2.1).

    Args:
        backend: a key of `BACKENDS`.
        x_ND: the rows.
        expert_NK: the K different experts of each row, int64, each in 0..E-1; for `TRITON_KERNELS` also the result of
            `plan_received`.
        gate_NK: gates (routing weights), in the dtype of x or float32; 0 for a dropped route.
        weights: the E experts.
        expert_capacity: largest number of rows of an expert, for the backends in `STATIC_BACKENDS`.

    Returns:
        y_ND in the dtype of x. All backends but `capacity` compute every route, even dropped ones. N may be 0, and
            experts may get no rows; gradients then still exist, as expert parallelism needs.
    """
    extra_arguments = {"expert_capacity": expert_capacity} if backend in STATIC_BACKENDS else {}
    with _without_autocast(x_ND):
        return BACKENDS[backend].run(x_ND, expert_NK, gate_NK, weights, **extra_arguments)


def run_sorted_experts(backend: str, x_RD: Tensor, counts: list[int], weights: ExpertWeights) -> Tensor:
    """Run rows that are sorted by expert through their experts, without gates; return y_RD.

    Args:
        backend: a key of `BACKENDS`.
        x_RD: rows; the first counts[0] belong to expert 0, and so on. R may be 0.
        counts: number of rows per expert, which may be 0; their sum is R.
        weights: the E experts.
    """
    count_E = torch.tensor(counts)
    if (run_sorted_rows := BACKENDS[backend].run_sorted) is not None:
        with _without_autocast(x_RD):
            return run_sorted_rows(x_RD, count_E, weights)
    # Backends without `run_sorted` take each row with the index of its expert, and sort the rows again. This is cheap
    # for `triton`, which sorts only R indices and reads the rows in place.
    expert_E = torch.arange(len(count_E), device=x_RD.device)
    # The host need not wait for the GPU, because the output size is known.
    expert_R = expert_E.repeat_interleave(copy_to_device(count_E, x_RD.device), output_size=len(x_RD))
    ones_R1 = torch.ones(len(x_RD), 1, dtype=torch.float32, device=x_RD.device)
    return run_experts(backend, x_RD, expert_R[:, None], ones_R1, weights)


def plan_for_kernel(kernel: str, expert_NK: Tensor, n_experts: int) -> Plan:
    """Sort routes by expert, by Triton kernels for `TRITON_KERNELS`; the routes of `n_experts` are last."""
    return (triton.plan_routes if kernel in TRITON_KERNELS else plan_routes)(expert_NK, n_experts)


def can_fuse_routing(kernel: str, logits_NE: Tensor) -> bool:
    """Return whether a layer with a kernel (as in `MoESpec.kernel`) routes by `triton.fused_routing`."""
    return _has_fused_routing(kernel, logits_NE.device) and triton.can_fuse_routing(logits_NE)


def can_fuse_logits(kernel: str, x_ND: Tensor) -> bool:
    """Return whether a layer with a kernel computes the logits of rows by `triton.fused_logits`."""
    return _has_fused_routing(kernel, x_ND.device) and triton.can_fuse_logits(x_ND)


def _has_fused_routing(kernel: str, device: torch.device) -> bool:
    return kernel in TRITON_KERNELS or (kernel == "auto" and device.type == "cuda")


def _without_autocast(x: Tensor) -> torch.autocast:
    """Disable autocast inside kernels, whose tensors have its dtype already."""
    # Inside a kernel, autocast would round values that are float32 on purpose. It would also widen values that must
    # stay narrow: on CUDA it makes the result of a norm float32, which cannot be multiplied by bfloat16 weights.
    return torch.autocast(x.device.type, enabled=False)
