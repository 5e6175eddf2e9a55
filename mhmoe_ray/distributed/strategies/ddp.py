"""DDP: every rank holds all parameters but other ranks' experts, and the last backward averages gradients. This module
also has the base class of all strategies."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mhmoe_ray.distributed.average import WeightAverage
from mhmoe_ray.distributed.mesh import Mesh
from mhmoe_ray.distributed.optimizer import build_optimizer, expert_parameters, set_learning_rate
from mhmoe_ray.distributed.rounded_adamw import MOMENT_NAMES, RoundedAdamW, ValuePosition
from mhmoe_ray.distributed.strategies.gradients import ExpertReduction, clip_gradients
from mhmoe_ray.model.autocast import DTYPES
from mhmoe_ray.model.feedforward import CastingModule
from mhmoe_ray.model.held import is_dtensor, shard_offset
from mhmoe_ray.model.trunk import Trunk
from mhmoe_ray.spec import RunSpec

FillModel = Callable[[Trunk], None]
"""Function that allocates a model on the meta device and fills it with weights; of a DTensor, only this rank's
shard."""

_ignore_parameters: Callable[[nn.Module, list[str]], None]
_ignore_parameters = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model


class Strategy:
    """The DDP strategy, and the base class of the others.

    A strategy holds the model and its optimizer, reduces gradients over ranks, updates the weights, and gives
    checkpoints the tensors to save or to fill.
    """

    holds_whole_weights = True  # in full and not as shards, except other ranks' experts
    gathers_state = False
    """True if `checkpoint_tensors` gathers from shards; else its views of weights and moments change only in
    `apply_update`."""
    average: WeightAverage | None = None
    """Average of the trained weights; None without `train.ema_decay`."""

    def __init__(self, model: Trunk, mesh: Mesh, spec: RunSpec, fill: FillModel) -> None:
        """Allocate and fill the model, which is on the meta device, wrap it, and build the optimizer; `fill` is called
        once."""
        self.model, self.mesh, self.spec = model, mesh, spec
        self.module: nn.Module = self._wrap_model(fill)  # called in place of the model if a backward follows
        self._expert_reduction = ExpertReduction(model, mesh)
        self.optimizer = build_optimizer(model, spec.train, spec.seed, self._value_positions())
        if spec.train.ema_decay is not None:
            self.average = WeightAverage(model.trained_parameters(), spec.train.ema_decay)

    def _wrap_model(self, fill: FillModel) -> nn.Module:
        """Fill the model, and return the module to call in its place, such as torch's DDP."""
        fill(self.model)
        if self.mesh.devices is None:
            return self.model
        _ignore_parameters(self.model, list(expert_parameters(self.model)))
        return DistributedDataParallel(self.model, gradient_as_bucket_view=True, forward_sync_buffers=False)

    @property
    def _moment_dtype(self) -> torch.dtype:
        return DTYPES[self.spec.train.moment_precision]

    def _value_positions(self) -> dict[nn.Parameter, ValuePosition]:
        parameters = self.model.trained_parameters()
        positions = {}
        for name, tensor in self._to_global({name: p.detach() for name, p in parameters.items()}).items():
            # All shards are ranges of rows, so only their first offset may differ from 0.
            first_row, *other_offsets = shard_offset(tensor) or (0,)
            assert not any(other_offsets)
            positions[parameters[name]] = ValuePosition(name, first_row * math.prod(tensor.shape[1:]))
        return positions

    def micro_batch_context(self, is_last: bool) -> AbstractContextManager[None]:
        """Return the context of a micro-batch's forward and backward. DDP and FSDP reduce gradients over ranks only in
        the rank's last backward of a step."""
        self._expert_reduction.is_last_backward = is_last
        if isinstance(self.module, DistributedDataParallel) and not is_last:
            return self.module.no_sync()
        return nullcontext()

    def whole_layers(self) -> list[CastingModule]:
        """Return the feed-forward layers and experts that are not sharded, to be cast once per step."""
        layers = [m for m in self.model.modules() if isinstance(m, CastingModule)]
        return [m for m in layers if not any(map(is_dtensor, m.parameters()))]

    def backward(self, objective: Tensor) -> None:
        """Run the backward of a micro-batch from its scalar loss, adding to this rank's gradients."""
        torch.autograd.backward(objective)

    def finish_reduction(self) -> None:
        """Complete the reduction of the step's gradients, after the last backward."""
        self._expert_reduction.finish()

    def apply_update(self, lr: float, accepts: Callable[[float], bool] = math.isfinite) -> float:
        """Clip gradients by their global norm and update the weights; return the norm before clipping, equal on all
        ranks. If it is not accepted, gradients are discarded and weights stay the same."""
        norm = clip_gradients(self.model, self.mesh, self.spec.train.clip_norm)
        if accepts(norm):
            set_learning_rate(self.optimizer, lr)
            self.optimizer.step()
            if self.average:
                self.average.update()
        self.optimizer.zero_grad()
        return norm

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Context in which the model has the averages of its weights, if there are any."""
        if not self.average:
            yield
            return
        self.average.swap()
        try:
            yield
        finally:
            self.average.swap()

    def checkpoint_weights(self) -> dict[str, Tensor]:
        """Return the weights by name, with experts and sharded tensors as DTensors of global shapes. Filling these
        views loads the model, unless `gathers_state` is True."""
        return dict(self._iterate_weights())

    def checkpoint_moments(self) -> dict[str, Tensor]:
        """Return AdamW's moments like `checkpoint_weights`, as "exp_avg.NAME" and "exp_avg_sq.NAME", created if
        missing."""
        return dict(self._iterate_moments())

    def checkpoint_averages(self) -> dict[str, Tensor]:
        """Return the averages of weights like `checkpoint_weights`; none without `train.ema_decay`. A checkpoint has
        them in place of the weights, so that everything that reads weights gets averages."""
        return self._to_global(self.average.tensors) if self.average else {}

    def checkpoint_trained_weights(self) -> dict[str, Tensor]:
        """Return the weights that a checkpoint with averages has for training, as "trained.NAME"."""
        averages = self.checkpoint_averages()
        return {f"trained.{name}": t for name, t in self.checkpoint_weights().items() if name in averages}

    def checkpoint_tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """Yield all tensors to save as ("weights" or "optim", name, tensor), in the same order on all ranks. This is a
        collective operation. A tensor that is gathered from shards is gathered when it is yielded."""
        # Gathered tensors come one at a time, so that the memory of one is free again before the next is gathered.
        averages, trained_weights = self.checkpoint_averages(), self.checkpoint_trained_weights()
        yield from (("weights", name, averages.get(name, t)) for name, t in self._iterate_weights())
        yield from (("optim", name, t) for name, t in trained_weights.items())
        yield from (("optim", name, t) for name, t in self._iterate_moments())
        yield from (("optim", name, t) for name, t in self.model.training_buffers().items())

    def frozen_weights(self) -> dict[str, Tensor]:
        """Return the weights that an adapter leaves as they are, like `checkpoint_weights`; none without an adapter."""
        trained_names = self.model.trained_parameters() if self.spec.train.adapter else self.model.named_tensors()
        return self._to_global({n: t for n, t in self.model.named_tensors().items() if n not in trained_names})

    def _iterate_weights(self) -> Iterator[tuple[str, Tensor]]:
        tensors = self.model.named_tensors()
        if self.spec.train.adapter:
            tensors = {name: tensors[name] for name in self.model.trained_parameters()}
        yield from self._to_global(tensors).items()

    def _iterate_moments(self) -> Iterator[tuple[str, Tensor]]:
        # The optimizer has no moments before its first update. A checkpoint may be saved earlier, if the updates of the
        # first steps were skipped.
        if not self.optimizer.state:
            self.start_at_step(0)
        state = self.optimizer.state
        for moment in MOMENT_NAMES:
            tensors = {name: state[p][moment] for name, p in self.model.trained_parameters().items()}
            yield from ((f"{moment}.{name}", t) for name, t in self._to_global(tensors).items())

    def start_at_step(self, step: int) -> None:
        """Give the optimizer its state after `step` updates, with moments of zero, which loading fills."""
        if self.average:
            self.average.updates = step
        step_device = "cpu" if isinstance(self.optimizer, RoundedAdamW) else None
        for parameter in self.model.trained_parameters().values():
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(step), device=step_device or parameter.device),
                **{moment: torch.zeros_like(parameter, dtype=self._moment_dtype) for moment in MOMENT_NAMES},
            }

    def finish_loading(self, weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        """Finish loading a checkpoint; views need nothing more."""

    def _to_global(self, local: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors by name, with those of experts as DTensors, without copies."""
        experts = expert_parameters(self.model)
        return {name: self.mesh.expert_dtensor(t) if name in experts else t for name, t in local.items()}
