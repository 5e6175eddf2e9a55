"""Experts as Triton kernels, fused or as grouped matrix products. The host never waits for a GPU.

This module imports Triton at the first use, because the base install does not include it.

    operators.py   kernels as operators of torch: the launch, sort of routes, copies and sums of rows, updates
    functions.py   matrix products and GELU, which several kernels call
    sort.py        stable sort of routes by expert, divided into tiles
    router.py, routing.py  logits, and softmax, top-k, gates, counts and losses in one pass, and their operators
    adamw.py       AdamW with moments in bfloat16
    rows.py        gather of rows, and the weighted sum of each row's routes
    fused/         an expert as one kernel, which never writes the hidden layer to memory
    grouped/       experts of any width as grouped matrix products, with small kernels between the products
    resources.py   resources of each compiled kernel, without a GPU
"""

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from shutil import which
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from mhmoe_kernels.choice import ExpertSizes
from mhmoe_kernels.weights import ExpertWeights

if TYPE_CHECKING:
    from mhmoe_kernels.triton.operators import SortedRoutes


def unavailable_reason(device: torch.device) -> str | None:
    """Return the reason why these kernels cannot run on `device`, in one line; None if they can."""
    if find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if device.type != "cuda" and not is_interpreted():
        return f"triton compiles for CUDA devices, and this is {device.type}; TRITON_INTERPRET=1 runs it here, slowly"
    if not is_interpreted() and not _has_compiler(os.environ.get("CC"), os.environ.get("PATH")):
        return "triton needs a C compiler for its kernel launchers, and there is neither gcc nor clang: install one"
    return None


def is_interpreted() -> bool:
    """Return whether TRITON_INTERPRET makes Triton interpret kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes")


def fused_refusal(device: torch.device, sizes: ExpertSizes) -> str | None:
    """Return in one line why `run_fused` cannot compute these experts on a GPU, or None.

    The kernels are compiled once for the GPU, which takes some seconds.
    """
    if device.type != "cuda":
        return None
    if torch.version.hip:
        return "kernel triton has only been compiled for NVIDIA's GPUs: use grouped_gemm"
    from mhmoe_kernels.triton.resources import fused_refusal as compiled_refusal

    kind = "swiglu" if sizes.function == "swiglu" else "gelu"
    properties = torch.cuda.get_device_properties(device)
    capability = 10 * properties.major + properties.minor
    dtype = torch.float32 if sizes.dtype == "float32" else torch.bfloat16
    shared_limit: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    reason = compiled_refusal(kind, sizes.row_width, dtype, capability, shared_limit)
    return f"kernel triton: {reason}" if reason else None


def grouped_mm_refusal(device: torch.device, sizes: ExpertSizes) -> str | None:
    """Return in one line why torch's grouped_mm is not used on a device, or None."""
    # AMD's GPUs number their compute capabilities differently from NVIDIA's.
    if device.type == "cuda" and torch.version.hip:
        return "kernel grouped_mm has only been considered for NVIDIA's GPUs: use grouped_gemm"
    if device.type == "cuda" and (major := torch.cuda.get_device_capability(device)[0]) not in (9, 10):
        return f"torch's grouped_mm makes the host wait on compute capability {major}.x: use grouped_gemm"
    return None


@cache
def _has_compiler(compiler: str | None, path: str | None) -> bool:
    return bool(compiler or which("gcc", path=path) or which("clang", path=path))


def run_fused(x_ND: Tensor, expert_NK: "Tensor | SortedRoutes", gate_NK: Tensor, weights: ExpertWeights) -> Tensor:
    """Run `mhmoe_kernels.run_experts` by fused experts, in float32 or bfloat16; float32 sums are bitwise reproducible.

    Other or mixed dtypes raise TypeError, and an `unavailable_reason` RuntimeError.
    """
    _check(x_ND, weights)
    from mhmoe_kernels.triton.fused.experts import run

    with _device_of(x_ND):
        return run(x_ND, expert_NK, gate_NK, weights)


def run_grouped(
    x_ND: Tensor, expert_NK: "Tensor | SortedRoutes", gate_NK: Tensor, weights: ExpertWeights, use_torch: bool = False
) -> Tensor:
    """Run `mhmoe_kernels.run_experts` by grouped matrix products; result and errors are those of `run_fused`.

    torch's grouped_mm (`use_torch`) needs SwiGLU experts.
    """
    _check(x_ND, weights)
    from mhmoe_kernels.triton.grouped.experts import run
    from mhmoe_kernels.triton.grouped.products import Products, TorchProducts

    with _device_of(x_ND):
        return run(TorchProducts if use_torch else Products, x_ND, expert_NK, gate_NK, weights)


def plan_routes(expert_NK: Tensor, n_experts: int) -> "SortedRoutes":
    """Sort routes by expert, like `permutation.plan_routes`, in stable order; the routes of `n_experts` are last."""
    from mhmoe_kernels.triton.operators import SortedRoutes, sort_routes

    # Nobody runs experts on these routes, so the tile size (128) does not matter.
    with _device_of(expert_NK):
        return SortedRoutes(*sort_routes(expert_NK, n_experts + 1, 128))


def plan_received(received_PX: Tensor, rows: int) -> "SortedRoutes":
    """Return the routes, for `run_experts`, of `rows` rows from P ranks that each sorted its own rows by expert.

    `received_PX` counts each rank's rows for each expert, int64 on the device.
    """
    from mhmoe_kernels.triton.grouped.blocks import rows_per_tile
    from mhmoe_kernels.triton.operators import SortedRoutes, sort_received

    with _device_of(received_PX):
        return SortedRoutes(*sort_received(received_PX, rows, rows_per_tile(rows, received_PX.shape[1])))


MAX_FUSED_EXPERTS = 1024
"""Largest number of experts of `fused_routing`: a program holds all logits of a row."""


class FusedRouting(NamedTuple):
    """Experts that a softmax router chooses for each row, with their gates, counts and losses."""

    expert_NK: Tensor
    """int64, in the order of preference."""
    gate_NK: Tensor
    """float32."""
    balance_loss: Tensor
    """Scalar: E * sum_e mean_n(p_ne) * (share of the counted choices that are e)."""
    z_loss: Tensor
    """Scalar: the mean over rows of the squared log-sum-exp of the logits."""
    count_E: Tensor
    """Kept routes of each expert, int64."""
    dropped_routes: Tensor
    """Routes beyond the expert capacity, int64 scalar."""


def can_fuse_routing(logits_NE: Tensor) -> bool:
    """Return whether `fused_routing` can compute the routing for these logits on this machine."""
    rows, experts = logits_NE.shape
    is_suitable = rows > 0 and experts <= MAX_FUSED_EXPERTS and logits_NE.dtype == torch.float32
    return is_suitable and can_run(logits_NE)


def can_fuse_logits(x_ND: Tensor) -> bool:
    """Return whether `fused_logits` can compute the logits of these rows on this machine."""
    # AMD's matrix units have no tf32x3.
    is_suitable = len(x_ND) > 0 and x_ND.dtype in (torch.float32, torch.bfloat16) and torch.version.hip is None
    return is_suitable and can_run(x_ND)


def fused_logits(x_ND: Tensor, weight_ED: Tensor) -> Tensor:
    """Return x @ weight^T in float32, computed by matrix units; rows and weights are float32 or bfloat16."""
    from mhmoe_kernels.triton.routing import logits

    with _device_of(x_ND):
        return logits(x_ND.contiguous(), weight_ED.contiguous())


def fused_routing(
    logits_NE: Tensor, top_k: int, capacity: int | None, *, normalized: bool, scale: float, counts_first: bool
) -> FusedRouting:
    """Choose the top k experts of each row by softmax, with gates, losses and their gradients, in fused kernels.

    Args:
        logits_NE: router logits for which `can_fuse_routing` is True.
        top_k: number of choices of each row.
        capacity: largest number of rows of an expert; None if routing is dropless. Routes beyond it are dropped: second
            choices before first ones, and later rows before earlier ones.
        normalized: whether the gates of a row add up to `scale`; otherwise they are probabilities times `scale`.
        scale: factor of the gates.
        counts_first: whether only first choices count in the load balancing loss.
    """
    from mhmoe_kernels.triton.routing import route

    with _device_of(logits_NE):
        return FusedRouting(*route(logits_NE, top_k, capacity, normalized, scale, counts_first))


def rounded_adamw(weight_V: Tensor, *arguments: Any) -> None:
    """Update weights with moments in bfloat16 by one kernel. The arguments are those of the operator of this name."""
    from mhmoe_kernels.triton import operators

    with _device_of(weight_V):
        operators.rounded_adamw(weight_V, *arguments)


def can_run(tensor: Tensor) -> bool:
    """Return whether these kernels can compute with a tensor on this machine."""
    # A fake tensor is on no real device, so there is no device to check.
    return _is_fake(tensor) or unavailable_reason(tensor.device) is None


def _device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which kernels are launched on the tensor's device."""
    # Code of torch.compile chooses the device itself, and fake tensors launch no kernels.
    if torch.compiler.is_compiling() or is_fake(tensor):
        return nullcontext()
    return torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call]


def _is_fake(tensor: Tensor) -> bool:
    # torch.compile cannot trace `is_fake`. The tensors that it traces stand for those of a real device.
    return not torch.compiler.is_compiling() and is_fake(tensor)


def _check(x_ND: Tensor, weights: ExpertWeights) -> None:
    # An unsupported dtype is reported before an unsupported machine, because another machine would not help.
    if {x_ND.dtype, *(w.dtype for w in weights.stacked)} not in ({torch.float32}, {torch.bfloat16}):
        raise TypeError(f"rows and weights must all be float32 or all bfloat16, not {x_ND.dtype} and others")
    # A fake tensor is on no real device, so there is no device to check.
    if not _is_fake(x_ND) and (reason := unavailable_reason(x_ND.device)):
        raise RuntimeError(reason)
