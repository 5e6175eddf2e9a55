"""Optimizer step: accumulated gradients of M micro-batches over all ranks, then one update; without Ray and files."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from mhmoe_kernels import unavailable_reason
from mhmoe_ray.distributed.build import build_dispatch, build_strategy
from mhmoe_ray.distributed.dispatch.exchange import SentBytes, Stopwatch, WaitTimer, flat_row_bytes
from mhmoe_ray.distributed.mesh import Mesh
from mhmoe_ray.errors import JobError, SpecError
from mhmoe_ray.model.adapter import add_adapters
from mhmoe_ray.model.build import build_model
from mhmoe_ray.model.init import init_weights
from mhmoe_ray.model.noise import Noise
from mhmoe_ray.model.router import Router, updated_bias
from mhmoe_ray.model.trunk import Trunk, routing_loss
from mhmoe_ray.planner.parts import CASTS, OTHER_WORK, REDUCTION, UPDATE
from mhmoe_ray.planner.sizes import bytes_per_value
from mhmoe_ray.spec import MoESpec, RunSpec
from mhmoe_ray.train.objectives import Environment, LossSums
from mhmoe_ray.train.objectives.base import objective_class
from mhmoe_ray.train.spikes import spike_reason

_register_hook: Callable[[Tensor, Callable[[Tensor], None]], Any] = Tensor.register_hook
_queue_callback: Callable[[Callable[[], None]], None] = torch.autograd.Variable._execution_engine.queue_callback


class StepSums(NamedTuple):
    """Losses, routes and traffic of one training step, summed over the micro-batches of one rank, or of all ranks."""

    targets: int  # those that count, over all ranks; for encoders and vision models, the patches and tokens read
    loss: float  # all terms over all targets that count, in nats for a decoder
    balance: float  # load balancing loss, summed over micro-batches and layers
    dropped: int  # routes dropped because the expert's capacity was used up, over all layers
    count_LE: Tensor  # kept routes to each expert of each layer, int64
    part_sums_P2: Tensor
    """Sum of each of the P losses or figures in `RunSpec.loss_names`, and its targets or samples, float64."""
    sent_bytes: SentBytes = SentBytes()  # to other ranks, by expert-parallel dispatch
    least_bytes: int = 0
    """Fewest bytes that flat dispatch can send for these tokens; over all ranks, a lower bound of `sent_bytes.rows`."""
    wait_seconds: float = 0.0  # this rank's waits for rows of other ranks
    own_seconds: float = 0.0  # this rank's time to the end of its last backward, without waits for other ranks


class Update(NamedTuple):
    """Result of one optimizer update."""

    norm: float  # of the gradient of all parameters before clipping
    lr: float
    applied: bool  # False if the norm is not finite or the step is a spike, and the spec says to skip such a step
    spike: str | None = None  # what makes the step a spike


# A few steps may have a gradient that is not finite by accident. More such steps in a row mean a fault of the run.
MAX_SKIPPED_STEPS = 10


class Trainer:
    """Trainer of one rank: its model, optimizer and mesh."""

    def __init__(
        self,
        spec: RunSpec,
        mesh: Mesh,
        device: torch.device,
        objective_inputs: Any = None,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        """Build the model with its dispatch and its parallel strategy, and initialize the weights.

        `objective_inputs` is the result of `Objective.load_inputs`. `on_progress` is called after each micro-batch and
        each tensor of a checkpoint or of the initial weights. A kernel or torch.compile that cannot run here, or a
        missing package, is a SpecError.
        """
        spec.check_compilation()
        assert spec.train.micro_batches % mesh.world_size == 0
        self.spec, self.mesh, self.device = spec, mesh, device
        self.on_progress = on_progress
        moe = spec.model.moe
        if moe and (reason := unavailable_reason(moe.kernel, device, spec.expert_sizes)):
            raise SpecError(f"model.moe.kernel {moe.kernel}", reason, "install what it needs, or set it to auto")
        # On this device, weights take no memory. The strategy allocates them later, because a rank may hold only a part
        # of them.
        with torch.device("meta"):
            self.model = build_model(spec.computed_model, mesh.expert_ids(moe.experts) if moe else None)
            if spec.train.adapter:
                add_adapters(self.model, spec.train.adapter)
        self.model.recompute = spec.train.recompute
        if spec.train.residual_precision == "bfloat16":
            self.model.residual_dtype = torch.bfloat16
        self._dispatch = build_dispatch(spec.cluster, mesh)
        if self._dispatch:
            for layer in self.model.moe_layers():
                layer.dispatch = self._dispatch
        if spec.train.compile:
            self.model.compile_blocks()
        self.strategy = build_strategy(self.model, mesh, spec, self._initialize_weights)
        self._count_timer = WaitTimer()
        environment = Environment(spec, mesh, device, self.forward, lambda: self.on_progress(), self._count_timer)
        self.objective = objective_class(spec)(environment, self.model, objective_inputs)
        self.step = 0
        self.tokens = 0  # targets that counted in the steps so far, over all ranks
        self.before_update: Callable[[], None] = lambda: None
        """Callback before each update of weights and moments, in which a checkpoint in progress finishes its copy."""
        self.skipped = 0  # steps so far whose updates were not applied
        self.skipped_in_a_row = 0  # consecutive steps up to now whose updates were not applied
        self.recent_updates: list[list[float]] = []
        """Loss and gradient norm of the last updates, at most `SpikeSpec.window`, oldest first. Skipped steps do not
        join, because a spike would raise the limit for the next ones."""
        self.updates_before = 0  # optimizer updates in earlier runs, if this run continues with their AdamW moments

    def _initialize_weights(self, model: Trunk) -> None:
        model.to_empty(device=self.device)
        init_weights(model, self.spec.seed, self.on_progress)

    def accumulate(self, batches: Iterable[Any]) -> StepSums:
        """Accumulate the gradients of this rank's M / world micro-batches over ranks, and return this rank's sums.

        Every target of a loss has the same weight in the step's loss, however much padding its micro-batch has. Padding
        is routed like any token, so the balance loss, the expert capacity and the route counts include it: they
        describe the rows that experts compute.
        """
        self.model.on_part(CASTS)
        spec, m = self.spec, self.spec.train.micro_batches
        rank_batches = m // self.mesh.world_size
        moe, objective = spec.model.moe, self.objective
        # The sums stay on the device until the end, so that the host does not wait for each micro-batch.
        loss_balance_dropped = torch.zeros(3, dtype=torch.float64, device=self.device)
        count_LE = self.zero_counts().to(self.device)
        part_sums_P2 = torch.zeros(len(spec.loss_names), 2, dtype=torch.float64, device=self.device)
        if self._dispatch:
            # A validation since the last step has sent rows to other ranks, too. Its bytes and waiting time do not
            # belong to this step, so they are discarded.
            self._dispatch.pop_sent_bytes()
            self._dispatch.pop_wait_seconds()
        stopwatch = Stopwatch(self.device)
        batches, term_counts, targets = objective.count_targets(batches)
        with self._weight_casts():
            for i, batch in enumerate(batches, start=1):
                with self.strategy.micro_batch_context(is_last=i == rank_batches):
                    micro_batch = self.step * m + self.mesh.rank + (i - 1) * self.mesh.world_size
                    noise = Noise(spec.seed, micro_batch)
                    output = self.forward(batch, noise)
                    sums: LossSums = objective.loss_sums(output, batch)
                    # Each term is M times the micro-batch's contribution to the mean over all targets of the step,
                    # where M is the number of micro-batches. The backward then divides by M.
                    terms = [
                        weight * (loss / (max(1, count) / m))
                        for weight, loss, count in zip(objective.weights, sums.terms, term_counts, strict=True)
                    ]
                    step_loss = sum(terms[1:], terms[0])
                    loss_balance_dropped[0] += sum(loss.detach() for loss in sums.terms)
                    part_sums_P2 += sums.part_sums_P2
                    routing = output.routing
                    if moe:
                        step_loss = step_loss + routing_loss(spec.model, routing)
                        balance_L = torch.stack([r.balance_loss.detach() for r in routing])
                        loss_balance_dropped[1] += balance_L.double().sum()
                        loss_balance_dropped[2] += torch.stack([r.dropped_routes for r in routing]).sum()
                        count_LE += torch.stack([r.count_E for r in routing])
                    # Strategies divide the sum of gradients over ranks by the world size. The step's loss is a mean
                    # over M micro-batches, so this factor replaces the division by the world size with a division by M.
                    step_loss = step_loss * (self.mesh.world_size / m)
                    if i == rank_batches:
                        # The callback is the first that this backward queues. So it is called at the backward's end,
                        # but before the callbacks with which DDP and FSDP wait for other ranks' gradients.
                        _register_hook(step_loss, lambda _: _queue_callback(stopwatch.stop))
                    # Each operation of the backward belongs to the part whose forward it differentiates. The rest is
                    # mostly waits for gradients of other ranks.
                    self.model.on_part(REDUCTION if self.mesh.world_size > 1 else OTHER_WORK)
                    self.strategy.backward(step_loss)
                self.on_progress()
        self.strategy.finish_reduction()
        self.model.on_part(OTHER_WORK)
        loss_sum, balance_sum, dropped = loss_balance_dropped.tolist()
        rank_sums = StepSums(targets, loss_sum, balance_sum, int(dropped), count_LE.cpu(), part_sums_P2.cpu())
        wait_seconds = self._dispatch.pop_wait_seconds() if self._dispatch else 0.0
        own_seconds = stopwatch.seconds() - wait_seconds - self._count_timer.pop_seconds()
        rank_sums = rank_sums._replace(wait_seconds=wait_seconds, own_seconds=own_seconds)
        if moe and self._dispatch:
            row_bytes = spec.model.row_width * bytes_per_value(spec)
            passes = 3 if spec.train.recompute == "block" else 2
            least_bytes = flat_row_bytes(rank_sums.count_LE, self.mesh.expert_ids(moe.experts), row_bytes, passes)
            rank_sums = rank_sums._replace(sent_bytes=self._dispatch.pop_sent_bytes(), least_bytes=least_bytes)
        return rank_sums

    @property
    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.spec.train.precision == "bfloat16")

    @contextmanager
    def _weight_casts(self) -> Iterator[None]:
        """Context for a step's micro-batches, in which unsharded weights are cast to autocast's dtype only once."""
        layers = self.strategy.whole_layers()
        try:
            with self._autocast:
                for layer in layers:
                    layer.step_casts = layer.cast_weights()
            with ExitStack() as contexts:
                # Autocast keeps its casts until its outermost context ends, so the outer context keeps them for the
                # whole step. The inner one disables autocast again, except inside `forward`, which enables it. Casts of
                # weights that are gathered from shards must not be kept, so with shards these contexts are not entered.
                if self.strategy.holds_whole_weights:
                    contexts.enter_context(self._autocast)
                    contexts.enter_context(torch.autocast(self.device.type, enabled=False))
                yield
        finally:
            for layer in layers:
                layer.step_casts = None

    def zero_counts(self) -> Tensor:
        """Return zeros for counts of routes to each layer's experts, (L, E), int64; E is 0 for a dense model."""
        moe = self.spec.model.moe
        return torch.zeros(self.spec.model.moe_layers, moe.experts if moe else 0, dtype=torch.int64)

    def _update_routers(self, moe: MoESpec, rank_count_LE: Tensor) -> None:
        """Update the selection biases and expert shares of routers from this rank's route counts of the step."""
        # The counts of routes are summed over all ranks, so that the result is the same for any number of ranks.
        count_LE = rank_count_LE.to(self.device, copy=True)
        if self.mesh.world_size > 1:
            dist.all_reduce(count_LE)
        for layer, count_E in zip(self.model.moe_layers(), count_LE, strict=True):
            router = cast("Router", layer.router)
            if moe.bias_rate and not self.spec.train.adapter:
                router.bias_E.copy_(updated_bias(router.bias_E, count_E, moe.bias_rate))
            if moe.balance_over == "step":
                router.share_E.copy_(count_E / count_E.sum())

    def update(self, sums: StepSums) -> Update:
        """Clip the gradients, update the weights if the gradients' norm is finite and the step is no spike, and count
        the step, even if skipped. All ranks raise a JobError if the norm is not finite and the spec does not skip such
        steps, or more than `MAX_SKIPPED_STEPS` consecutive ones were skipped."""
        lr, spikes, spike = self.spec.train.learning_rate(self.step + 1), self.spec.train.spikes, None
        self.before_update()
        self.model.on_part(UPDATE)
        if spikes:
            loss = self._step_loss(sums)
            reason_at = partial(spike_reason, spikes, self.recent_updates, loss)
            norm = self.strategy.apply_update(lr, lambda norm: math.isfinite(norm) and not reason_at(norm))
            spike = reason_at(norm) if math.isfinite(norm) else None
        else:
            norm = self.strategy.apply_update(lr)
        applied = spike is None and math.isfinite(norm)
        if spikes and applied:
            self.recent_updates = [*self.recent_updates, [loss, norm]][-spikes.window :]
        moe = self.spec.model.moe
        if applied and moe and (moe.bias_rate or moe.balance_over == "step"):
            self._update_routers(moe, sums.count_LE)
        self.model.on_part(OTHER_WORK)
        self.skipped_in_a_row = 0 if applied else self.skipped_in_a_row + 1
        stops = spike is None and self.spec.train.on_nonfinite == "stop"
        if not applied and (stops or self.skipped_in_a_row > MAX_SKIPPED_STEPS):
            if spike:
                reason = f"step {self.step + 1} is a spike ({spike})"
            else:
                reason = f"the gradient of step {self.step + 1} is not finite (norm {norm})"
            if self.skipped_in_a_row > 1:
                reason += f", and the {self.skipped_in_a_row - 1} steps before it were skipped too"
            raise JobError("training", reason, "submit again with a lower train.lr or longer warm-up")
        self.skipped += not applied
        self.step += 1
        self.tokens += sums.targets
        return Update(norm, lr, applied, spike)

    def _step_loss(self, sums: StepSums) -> float:
        """Return the step's loss over all ranks, from this rank's sums. This is a collective operation."""
        values = torch.cat([torch.tensor([sums.loss], dtype=torch.float64), sums.part_sums_P2.flatten()])
        if self.mesh.world_size > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        loss, part_sums_P2 = float(values[0]), values[1:].cpu().view_as(sums.part_sums_P2)
        return self.objective.step_loss(loss, sums.targets, part_sums_P2)

    def forward(self, batch: Any, noise: Noise | None = None) -> Any:
        """Return the model's losses and routing of a micro-batch in the run's precision; `noise` is None in
        validation."""
        arguments = self.objective.model_arguments(batch)
        with self._autocast:
            # A forward without a backward needs no parallel strategy.
            model = self.strategy.module if torch.is_grad_enabled() else self.model
            return model(*arguments.positional, noise=noise, **arguments.keywords)
