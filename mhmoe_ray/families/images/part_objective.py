"""Base class of the objectives of encoders and vision models, whose micro-batches have parts with losses of their own.

The loss of a step is the sum of these losses, weighted by part. Each loss is a mean over all its targets in the step,
so the number of a part's targets does not affect how much the part counts.
"""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mhmoe_ray.data.family import PartSamples
from mhmoe_ray.data.samples import held_out_samples
from mhmoe_ray.data.shards.manifest import DataManifest
from mhmoe_ray.families.images.part_losses import PartLosses
from mhmoe_ray.model.trunk import Trunk
from mhmoe_ray.spec import MicroBatchPart
from mhmoe_ray.train.objectives.base import Environment, LossSums, ModelArguments, Objective, Validation

Batch = TypeVar("Batch")


class PartObjective(Objective[Batch, PartLosses]):
    """Objective of models whose output is the losses of a micro-batch's parts."""

    rows_per_micro_batch = 1

    def __init__(self, environment: Environment, model: Trunk, inputs: Any = None) -> None:
        super().__init__(environment, model)
        self.weights = tuple(part.weight for part in self.spec.parts for _ in part.losses)

    @abstractmethod
    def target_counts(self, batch: Batch) -> list[int]:
        """Return how many targets each loss of a micro-batch has, such as hidden tokens or images."""

    @abstractmethod
    def evaluated_samples(self, part: MicroBatchPart, samples: Any) -> int:
        """Return how many of a part's held-out samples a validation uses; it takes the first ones."""

    @abstractmethod
    def part_batch(self, part: MicroBatchPart, samples: Any, start: int, stop: int) -> Batch:
        """Return held-out samples `start` to `stop` - 1 of a part as a micro-batch; a rank without samples in the last
        round gets an empty one."""

    def losses_of(self, part: MicroBatchPart) -> slice:
        """Return the positions of a part's losses among those of a micro-batch of `part_batch`, by default all."""
        return slice(None)

    def count_targets(self, batches: Iterable[Batch]) -> tuple[Iterable[Batch], list[int], int]:
        batches = list(batches)
        counts = np.sum([self.target_counts(batch) for batch in batches], axis=0)
        count_P = torch.from_numpy(counts).to(self.device)
        if self.mesh.world_size > 1:
            with self.environment.wait_timer.measure(self.device):
                dist.all_reduce(count_P)
        return batches, count_P.tolist(), self.spec.tokens_per_step

    def model_arguments(self, batch: Batch) -> ModelArguments:
        return ModelArguments((batch,), {})

    def loss_sums(self, output: PartLosses, batch: Batch) -> LossSums:
        terms = [loss.sum for loss in output.losses]
        sum_P = torch.stack(terms).detach().double()
        count_P = torch.tensor(self.target_counts(batch), dtype=torch.float64).to(self.device)
        return LossSums(terms, torch.stack([sum_P, count_P], 1))

    def step_loss(self, loss: float, targets: int, part_sums_P2: Tensor) -> float:
        return _weighted_mean(self.weights, part_sums_P2)

    def load_validation(self, manifest: DataManifest) -> Mapping[str, PartSamples[Any]]:
        return held_out_samples(self.spec, manifest)

    @torch.no_grad()
    def validate(self, samples: Mapping[str, Any]) -> Validation:
        parts = [part for part in self.spec.parts if part.name in samples]
        sum_P2 = torch.cat([self.part_sums(part, samples[part.name]) for part in parts])
        names = [name for part in parts for name in part.losses]
        weights = [part.weight for part in parts for _ in part.losses]
        part_losses = dict(zip(names, (sum_P2[:, 0] / sum_P2[:, 1].clamp(min=1)).tolist(), strict=True))
        return Validation(_weighted_mean(weights, sum_P2), int(sum_P2[:, 1].sum()), part_losses)

    def part_sums(self, part: MicroBatchPart, samples: Any, batches: int | None = None) -> Tensor:
        """Validate a part on at most `batches` micro-batches, by default all: return the sum and the number of targets
        of each of its P losses over all ranks, (P, 2) float64."""
        total = self.evaluated_samples(part, samples)
        if batches is not None:
            total = min(total, batches * part.samples)
        world, rank = self.mesh.world_size, self.mesh.rank
        sum_P2 = torch.zeros(len(part.losses), 2, dtype=torch.float64, device=self.device)
        for round_start in range(0, total, world * part.samples):
            start = min(total, round_start + rank * part.samples)
            stop = min(total, start + part.samples)
            # A rank without samples in the last round still takes part in every all-to-all, with no rows.
            batch = self.part_batch(part, samples, start, stop)
            sum_P2 += self.loss_sums(self.environment.run_model(batch), batch).part_sums_P2[self.losses_of(part)]
            self.environment.on_progress()
        if world > 1:
            dist.all_reduce(sum_P2)
        return sum_P2.cpu()


def _weighted_mean(weights: Sequence[float], sum_P2: Tensor) -> float:
    """Return the weighted sum of mean losses; `sum_P2` has the sum and the number of targets of each loss."""
    means: list[float] = (sum_P2[:, 0] / sum_P2[:, 1].clamp(min=1)).tolist()
    return sum(weight * mean for weight, mean in zip(weights, means, strict=True))
