"""DDP: every rank holds all parameters but other ranks' experts, and averages gradients in the last backward of a step.

This module also has what all strategies share: gradients of experts are reduced over ranks, and all gradients are
clipped by their global norm.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mhmoe_ray.distributed.mesh import Mesh
from mhmoe_ray.distributed.optimizer import build_optimizer, expert_parameters, set_learning_rate
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.spec import TrainSpec


def reduce_expert_gradients(model: Decoder, mesh: Mesh) -> None:
    """Sum the gradients of experts over dp and divide them by dp * ep.

    A rank's experts already have the gradients of all ep ranks of its group, which sent them their rows.
    """
    if mesh.world == 1:
        return
    for parameter in expert_parameters(model).values():
        if parameter.grad is None:  # no row in any micro-batch of the step
            parameter.grad = torch.zeros_like(parameter)
        if isinstance(parameter, DTensor):
            continue  # FSDP did so
        if mesh.size("dp") > 1:
            dist.all_reduce(parameter.grad, group=mesh.group("dp"))
        parameter.grad /= mesh.world


def clip_gradients(model: Decoder, mesh: Mesh, clip_norm: float) -> float:
    """Scale all gradients so that their norm over all parameters and experts is at most `clip_norm`.

    Returns:
        The norm before clipping, the same number on every rank.
    """
    experts = expert_parameters(model)
    everywhere: list[Tensor] = []  # the same on every rank
    by_ep: list[Tensor] = []  # other ep ranks have others, dp ranks the same
    sliced: list[Tensor] = []  # each rank has its own
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        if isinstance(parameter.grad, DTensor):
            sliced.append(parameter.grad.to_local())
        else:
            (by_ep if name in experts else everywhere).append(parameter.grad)
    device = next(model.parameters()).device
    squares = torch.stack([_square_sum(grads, device) for grads in (everywhere, by_ep, sliced)])
    if mesh.size("ep") > 1:
        dist.all_reduce(squares[1], group=mesh.group("ep"))
    if sliced:
        dist.all_reduce(squares[2])
    norm = float(squares.sum().sqrt())
    # Scaling cannot mend a norm that is not finite; the caller must look.
    if clip_norm < norm < float("inf"):
        torch._foreach_mul_(everywhere + by_ep + sliced, clip_norm / norm)
    return norm


def _square_sum(grads: list[Tensor], device: torch.device) -> Tensor:
    if not grads:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(grads)).double().square().sum()


MOMENTS = ("exp_avg", "exp_avg_sq")
Fill = Callable[[Decoder], None]
"""Function that gives a model on the meta device its memory and its initial weights; of DTensors, this rank's
shards."""

_leave_out: Callable[[nn.Module, list[str]], None]
_leave_out = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model


class Strategy:
    """DDP strategy, and the base class of the other strategies."""

    gathers = False
    """Whether `state` gathers tensors for its caller. Otherwise they are views, which change only in `apply`."""

    def __init__(self, model: Decoder, mesh: Mesh, spec: TrainSpec, fill: Fill) -> None:
        """Fill and wrap the model, and build the optimizer.

        Args:
            model: model on the meta device.
            mesh: mesh of this rank.
            spec: `train` section of the spec.
            fill: function that gives the model its memory and weights; called once.
        """
        self.model, self.mesh, self.spec = model, mesh, spec
        self.module: nn.Module = self._wrapped(fill)
        """Module that is called for a forward pass that will have a backward."""
        self.optimizer = build_optimizer(model, spec)

    def _wrapped(self, fill: Fill) -> nn.Module:
        fill(self.model)
        if self.mesh.world == 1:
            return self.model
        _leave_out(self.model, list(expert_parameters(self.model)))
        return DistributedDataParallel(self.model, gradient_as_bucket_view=True, forward_sync_buffers=False)

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """Return the context for forward and backward of a micro-batch.

        Args:
            last: whether this is the last micro-batch of this rank's step, in which ranks reduce gradients.
        """
        if isinstance(self.module, DistributedDataParallel) and not last:
            return self.module.no_sync()
        return nullcontext()

    def backward(self, objective: Tensor) -> None:
        """Add this micro-batch's gradients, which are to be averaged over ranks."""
        torch.autograd.backward(objective)

    def finish(self) -> None:
        """Complete the reduction of the step's gradients over ranks, after the last backward."""
        reduce_expert_gradients(self.model, self.mesh)

    def apply(self, lr: float) -> float:
        """Clip by the global norm and update; return the norm before clipping, the same on every rank.

        If the norm is not finite, the gradients are dropped and nothing changes.
        """
        norm = clip_gradients(self.model, self.mesh, self.spec.clip_norm)
        if math.isfinite(norm):
            set_learning_rate(self.optimizer, lr)
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def weights(self) -> dict[str, Tensor]:
        """Return everything that a checkpoint's `weights` holds, by the model's names, as views: filling them loads the
        model.

        Experts are slices of the global [E, ...], and sharded tensors are slices of the whole.
        """
        return self._as_global(self.model.tensors())

    def moments(self) -> dict[str, Tensor]:
        """Return AdamW's two moments in the same way, as "exp_avg.NAME" and "exp_avg_sq.NAME".

        They are zeros before the first update, which may come some steps after the first step.
        """
        if not self.optimizer.state:
            self.begin_at(0)
        state = self.optimizer.state
        found: dict[str, Tensor] = {}
        for moment in MOMENTS:
            named = {name: state[p][moment] for name, p in self.model.named_parameters()}
            found |= {f"{moment}.{name}": t for name, t in self._as_global(named).items()}
        return found

    def state(self) -> Iterator[tuple[str, str, Tensor]]:
        """Yield part, name and tensor of everything that a checkpoint holds, in the same order on all ranks.

        This is a collective operation.
        """
        yield from (("weights", name, t) for name, t in self.weights().items())
        yield from (("optim", name, t) for name, t in self.moments().items())

    def begin_at(self, step: int) -> None:
        """Make room for moments after `step` updates, so that `moments` can be filled."""
        for parameter in self.model.parameters():
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(step), device=parameter.device),
                **{moment: torch.zeros_like(parameter) for moment in MOMENTS},
            }

    def loaded(self, weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        """Finish loading, when the tensors that `weights` and `moments` returned have been filled; nothing is left to
        do here."""

    def _as_global(self, local: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors with experts as views of global ones, not copies."""
        experts = expert_parameters(self.model)
        return {name: self.mesh.expert_dtensor(t) if name in experts else t for name, t in local.items()}
