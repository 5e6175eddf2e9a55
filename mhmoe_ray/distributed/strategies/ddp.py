"""DDP: every rank holds all parameters but other ranks' experts, and averages gradients in the last backward of a step.

This module also has the base class of all strategies, the reduction of experts' gradients, and gradient clipping.
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
    """Sum the gradients of experts over dp and divide them by dp * ep, in place.

    Experts without a gradient get one of zeros. Gradients of experts that FSDP shards are complete already.
    """
    # A rank's experts have computed the rows of all ep ranks of their group, so their gradients already have the sum
    # over ep. Only the sum over dp is missing.
    if mesh.world_size == 1:
        return
    for parameter in expert_parameters(model).values():
        # If a rank's experts got no row in any micro-batch of the step, they have no gradient, but the all-reduce needs
        # a tensor from every rank.
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        # FSDP itself has already summed and divided the gradients of sharded experts.
        if isinstance(parameter, DTensor):
            continue
        if mesh.size("dp") > 1:
            dist.all_reduce(parameter.grad, group=mesh.group("dp"))
        parameter.grad /= mesh.world_size


def clip_gradients(model: Decoder, mesh: Mesh, clip_norm: float) -> float:
    """Scale all gradients in place so that their global norm, over the parameters of all ranks, is at most `clip_norm`.

    Gradients whose norm is not finite stay as they are.

    Returns:
        The norm before clipping, the same number on every rank.
    """
    experts = expert_parameters(model)
    # The norm must count each value once, so gradients are split into three kinds: replicated ones are the same on
    # every rank, those of experts differ between ep ranks only, and sharded ones differ on every rank.
    replicated: list[Tensor] = []
    per_ep_rank: list[Tensor] = []
    sharded: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        if isinstance(parameter.grad, DTensor):
            sharded.append(parameter.grad.to_local())
        else:
            (per_ep_rank if name in experts else replicated).append(parameter.grad)
    device = next(model.parameters()).device
    squares = torch.stack([_square_sum(grads, device) for grads in (replicated, per_ep_rank, sharded)])
    if mesh.size("ep") > 1:
        dist.all_reduce(squares[1], group=mesh.group("ep"))
    if sharded:
        dist.all_reduce(squares[2])
    norm = float(squares.sum().sqrt())
    # Scaling cannot repair gradients whose norm is not finite, so they stay as they are and the caller must check the
    # norm.
    if clip_norm < norm < float("inf"):
        torch._foreach_mul_(replicated + per_ep_rank + sharded, clip_norm / norm)
    return norm


def _square_sum(gradients: list[Tensor], device: torch.device) -> Tensor:
    """Return the sum of the squares of all values, as a float64 scalar on the device."""
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(gradients)).double().square().sum()


MOMENT_NAMES = ("exp_avg", "exp_avg_sq")
FillModel = Callable[[Decoder], None]
"""Function that allocates the memory of a model on the meta device and fills it with weights. For a DTensor, it does so
only for this rank's shard."""

_ignore_parameters: Callable[[nn.Module, list[str]], None]
_ignore_parameters = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model


class Strategy:
    """The DDP strategy, and the base class of the others.

    A strategy holds the model and its optimizer. It reduces gradients over ranks, updates the weights, and gives
    checkpoints the tensors to save or to fill.
    """

    gathers_state = False
    """True if `checkpoint_tensors` gathers tensors for its caller. Otherwise they are views, which change only in
    `apply_update`."""

    def __init__(self, model: Decoder, mesh: Mesh, spec: TrainSpec, fill: FillModel) -> None:
        """Fill and wrap the model, and build the optimizer.

        Args:
            model: model on the meta device.
            mesh: mesh of this rank.
            spec: `train` section of the spec.
            fill: function that allocates and fills the model's weights; it is called once.
        """
        self.model, self.mesh, self.spec = model, mesh, spec
        self.module: nn.Module = self._wrap_model(fill)
        """Module to call for each forward pass with a backward."""
        self.optimizer = build_optimizer(model, spec)

    def _wrap_model(self, fill: FillModel) -> nn.Module:
        """Fill the model, and return the module to call in its place."""
        fill(self.model)
        if self.mesh.world_size == 1:
            return self.model
        _ignore_parameters(self.model, list(expert_parameters(self.model)))
        return DistributedDataParallel(self.model, gradient_as_bucket_view=True, forward_sync_buffers=False)

    def micro_batch_context(self, is_last: bool) -> AbstractContextManager[None]:
        """Return the context in which forward and backward of a micro-batch must run.

        Args:
            is_last: whether this is this rank's last micro-batch of the step. DDP and FSDP reduce gradients over ranks
                only in its backward.
        """
        if isinstance(self.module, DistributedDataParallel) and not is_last:
            return self.module.no_sync()
        return nullcontext()

    def backward(self, objective: Tensor) -> None:
        """Run the backward of a micro-batch, which adds to the gradients of this rank.

        Args:
            objective: scalar to minimize.
        """
        torch.autograd.backward(objective)

    def finish_reduction(self) -> None:
        """Complete the reduction of the step's gradients over ranks, after the last backward."""
        reduce_expert_gradients(self.model, self.mesh)

    def apply_update(self, lr: float) -> float:
        """Clip gradients by their global norm and update the weights; return the norm before clipping, which is the
        same on every rank.

        If the norm is not finite, the gradients are discarded and the weights stay the same.
        """
        norm = clip_gradients(self.model, self.mesh, self.spec.clip_norm)
        if math.isfinite(norm):
            set_learning_rate(self.optimizer, lr)
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def checkpoint_weights(self) -> dict[str, Tensor]:
        """Return the weights of a checkpoint by name, with global shapes: experts and sharded tensors are DTensors.

        They are views, so that filling them loads the model, unless `gathers_state` is True.
        """
        return self._to_global(self.model.named_tensors())

    def checkpoint_moments(self) -> dict[str, Tensor]:
        """Return AdamW's two moments for a checkpoint, by the names "exp_avg.NAME" and "exp_avg_sq.NAME". They are
        views like the weights; moments that do not exist yet are created."""
        # The optimizer has no moments before its first update. A checkpoint may be saved earlier, if the updates of the
        # first steps were skipped.
        if not self.optimizer.state:
            self.start_at_step(0)
        state = self.optimizer.state
        moments: dict[str, Tensor] = {}
        for moment in MOMENT_NAMES:
            tensors = {name: state[p][moment] for name, p in self.model.named_parameters()}
            moments |= {f"{moment}.{name}": t for name, t in self._to_global(tensors).items()}
        return moments

    def checkpoint_tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """Yield the part of the checkpoint ("weights" or "optim"), the name and the tensor of all tensors to save, in
        the same order on all ranks.

        This is a collective operation.
        """
        yield from (("weights", name, t) for name, t in self.checkpoint_weights().items())
        yield from (("optim", name, t) for name, t in self.checkpoint_moments().items())
        yield from (("optim", name, t) for name, t in self.model.training_buffers().items())

    def start_at_step(self, step: int) -> None:
        """Give the optimizer the state that it has after `step` updates, with moments of zero. Loading a checkpoint
        fills them afterwards."""
        for parameter in self.model.parameters():
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(step), device=parameter.device),
                **{moment: torch.zeros_like(parameter) for moment in MOMENT_NAMES},
            }

    def finish_loading(self, weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        """Finish loading a checkpoint, which has filled the tensors of `checkpoint_weights` and `checkpoint_moments`.

        Here there is nothing to do, because those tensors are views.
        """

    def _to_global(self, local: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the same tensors by parameter name, but those of experts as DTensors of the global shape, without
        copies."""
        experts = expert_parameters(self.model)
        return {name: self.mesh.expert_dtensor(t) if name in experts else t for name, t in local.items()}
