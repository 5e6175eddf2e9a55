"""The cross-entropy of next tokens from the last hidden states: from all logits at once, or chunk by chunk.

The logits of N tokens over a vocabulary of size V are N * V values. The loss from all logits at once holds them several
times: in the dtype of the product, in float32, as log-probabilities and as gradients. The chunked loss computes logits
and their gradients a few tokens at a time, so that only a few chunks exist. It keeps two gradients for the backward:
that of the hidden states, and that of the output layer's weights in float32.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mhmoe_ray.model.autocast import matmul_dtype
from mhmoe_ray.spec.train import LOSS_CHUNKS_PER_PRODUCT

PRODUCT_ROWS = {"cpu": 4096, "cuda": 32768}
"""Rows of the weights' gradient added to its float32 sum at a time; on a CPU, this many rows stay in the cache."""


class Targets(NamedTuple):
    """Next tokens that a decoder should predict for a batch."""

    token_BT: Tensor  # next token of each position, int64
    counts_BT: Tensor  # bool: True for targets that count in the loss


class Loss(NamedTuple):
    """Cross-entropy of a batch in nats, float32."""

    sum: Tensor  # over the targets that count, a scalar with gradients
    token_BT: Tensor  # 0 for targets that do not count; without gradients if chunked


def token_losses(logits_BTV: Tensor, target_BT: Tensor) -> Tensor:
    """Return the cross-entropy of each token in nats, float32, BT."""
    loss = F.cross_entropy(logits_BTV.float().flatten(0, 1), target_BT.flatten(), reduction="none")
    return loss.view(target_BT.shape)


def full_loss(logits_BTV: Tensor, targets: Targets) -> Loss:
    """Return the cross-entropy of a batch from all logits at once."""
    loss_BT = token_losses(logits_BTV, targets.token_BT) * targets.counts_BT
    return Loss(loss_BT.sum(), loss_BT)


def chunked_loss(x_BTM: Tensor, weight_VM: Tensor, targets: Targets, chunk_rows: int) -> Loss:
    """Return the cross-entropy for the logits x @ weight^T, of which only `chunk_rows` tokens' logits exist at a time.

    Products are in autocast's dtype if autocast is on, and log-probabilities are in float32, as with all logits at
    once. The gradient of the weights is summed over chunks in float32. The loss cannot be differentiated twice.
    """
    dtype = matmul_dtype(x_BTM)
    differentiable = torch.is_grad_enabled()
    loss, loss_N = _apply_chunked_loss(
        x_BTM.flatten(0, 1), weight_VM, targets.token_BT.flatten(), targets.counts_BT.flatten(), chunk_rows, dtype,
        differentiable and x_BTM.requires_grad, differentiable and weight_VM.requires_grad,
    )  # fmt: skip
    return Loss(loss, loss_N.view(targets.token_BT.shape))


class _ChunkedLoss(torch.autograd.Function):
    """Autograd function whose forward computes the gradients and whose backward scales them."""

    @staticmethod
    def forward(
        ctx: Any, x_NM: Tensor, weight_VM: Tensor, target_N: Tensor, counts_N: Tensor, chunk_rows: int,
        dtype: torch.dtype, needs_dx: bool, needs_dweight: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        compute_weight_VM = weight_VM.to(dtype)
        needs_gradients = needs_dx or needs_dweight
        loss_N = x_NM.new_empty(len(x_NM), dtype=torch.float32)
        dx_NM = torch.empty_like(x_NM) if needs_dx else None
        dweight_VM = torch.zeros_like(weight_VM, dtype=torch.float32) if needs_dweight else None
        # In a dtype narrower than float32, gradients of logits take little memory, so one larger matrix product takes
        # those of several chunks.
        product_rows = chunk_rows * (1 if dtype == torch.float32 else LOSS_CHUNKS_PER_PRODUCT)
        buffer_rows = min(product_rows, len(x_NM)) if needs_gradients else 0
        buffer_PV = weight_VM.new_empty(buffer_rows, len(weight_VM), dtype=dtype)
        for product_start in range(0, len(x_NM), product_rows):
            product_end = min(product_start + product_rows, len(x_NM))
            dlogits_PV = buffer_PV[: product_end - product_start]
            for start in range(product_start, product_end, chunk_rows):
                rows = slice(start, min(start + chunk_rows, product_end))
                target_C1 = target_N[rows, None]
                logprob_CV = F.log_softmax(F.linear(x_NM[rows].to(dtype), compute_weight_VM).float(), dim=-1)
                loss_N[rows] = -logprob_CV.gather(1, target_C1)[:, 0] * counts_N[rows]
                if needs_gradients:
                    # The gradient with respect to a row's logits is the row's probabilities, less 1 at the target.
                    dlogits_CV = logprob_CV.exp_()
                    dlogits_CV.scatter_add_(1, target_C1, dlogits_CV.new_full((), -1.0).expand_as(target_C1))
                    dlogits_PV[rows.start - product_start : rows.stop - product_start] = dlogits_CV
            rows = slice(product_start, product_end)
            # Targets that do not count are masked in rows of width M, which takes less work than in rows of V logits.
            counts_P1 = counts_N[rows, None]
            if dx_NM is not None:
                dx_NM[rows] = (dlogits_PV @ compute_weight_VM) * counts_P1
            if dweight_VM is not None:
                _add_product(dweight_VM, dlogits_PV.T, x_NM[rows].to(dtype) * counts_P1)
        ctx.save_for_backward(dx_NM, dweight_VM)
        ctx.weight_dtype = weight_VM.dtype
        ctx.mark_non_differentiable(loss_N)
        return loss_N.sum(), loss_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        dx_NM, dweight_VM = ctx.saved_tensors
        dx_NM = None if dx_NM is None else dx_NM * dloss
        # This gradient is as large as the weights, so it is scaled in place. This is safe because the backward runs
        # only once.
        dweight_VM = None if dweight_VM is None else dweight_VM.mul_(dloss).to(ctx.weight_dtype)
        return dx_NM, dweight_VM, None, None, None, None, None, None


_apply_chunked_loss: Callable[..., tuple[Tensor, Tensor]] = _ChunkedLoss.apply


def _add_product(sum_VM: Tensor, a_VC: Tensor, b_CM: Tensor) -> None:
    if a_VC.dtype == sum_VM.dtype:
        sum_VM.addmm_(a_VC, b_CM)
        return
    rows = PRODUCT_ROWS[sum_VM.device.type]
    for sum_part, a_part in zip(torch.split(sum_VM, rows), torch.split(a_VC, rows), strict=True):
        sum_part += a_part @ b_CM
