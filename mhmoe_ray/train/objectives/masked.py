"""The objectives of encoders: hidden patches and tokens are predicted, and images are matched with their texts.

Each part of a micro-batch is a group of the encoder's batch, and has one loss for its patches, one for its tokens, or
one for its pairs. The loss of a step is the sum over these losses of the part's weight times the mean over all their
targets, so a part counts equally whatever the number of its targets. The pairs of a contrastive part are compared
within a micro-batch, so their loss does not depend on the number of ranks.
"""

import hashlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mhmoe_ray.data.encoder_batches import BatchMaker, evaluated_samples
from mhmoe_ray.data.shards.columns import EncoderSamples
from mhmoe_ray.model.encoder import EncoderBatch, EncoderLoss, Group
from mhmoe_ray.model.noise import Noise
from mhmoe_ray.spec import MicroBatchPart
from mhmoe_ray.train.objectives.base import Environment, LossSums, Objective, Validation
from mhmoe_ray.train.objectives.next_token import DIGEST_BYTES

if TYPE_CHECKING:
    from mhmoe_ray.data.shards.manifest import DataManifest


def encoder_digest(samples: EncoderSamples) -> int:
    """Return the digest of a micro-batch: of its crops, its tokens, and the masks of both."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for column in samples:
        digest.update(np.ascontiguousarray(column).tobytes())
    return int.from_bytes(digest.digest(), "little")


class Masked(Objective[EncoderBatch, EncoderLoss]):
    """Objective of encoders: the parts of a micro-batch with their objectives."""

    rows_per_micro_batch = 1

    def __init__(self, environment: Environment, codebook: np.ndarray | None = None) -> None:
        super().__init__(environment)
        self._batch_maker = BatchMaker(self.spec.model, self.device, codebook)
        self.weights = tuple(part.weight for part in self.spec.parts for _ in part.losses)

    def receive(self, rows: Mapping[str, np.ndarray]) -> tuple[int, EncoderBatch]:
        # Columns of the stream may be read-only memory, of which torch makes no tensors.
        samples = EncoderSamples(*(np.array(rows[name][0]) for name in EncoderSamples._fields))
        return encoder_digest(samples), self._batch_maker.make(self.spec.parts, samples)

    def count_targets(self, batches: Iterable[EncoderBatch]) -> tuple[Iterable[EncoderBatch], list[int], int]:
        batches = list(batches)
        counts = np.sum([_target_counts(batch.groups) for batch in batches], axis=0)
        count_P = torch.from_numpy(counts).to(self.device)
        if self.mesh.world_size > 1:
            dist.all_reduce(count_P)
        return batches, count_P.tolist(), self.spec.tokens_per_step

    def run(self, batch: EncoderBatch, noise: Noise | None) -> EncoderLoss:
        output: EncoderLoss = self.environment.run_model(batch, noise=noise)
        return output

    def loss_sums(self, output: EncoderLoss, batch: EncoderBatch) -> LossSums:
        terms = [loss.sum for loss in output.losses]
        sum_P = torch.stack(terms).detach().double()
        count_P = torch.tensor(_target_counts(batch.groups), dtype=torch.float64).to(self.device)
        return LossSums(terms, torch.stack([sum_P, count_P], 1))

    def step_loss(self, loss: float, targets: int, part_sums_P2: Tensor) -> float:
        return _weighted_mean(self.weights, part_sums_P2)

    def load_validation(self, manifest: "DataManifest") -> Mapping[str, EncoderSamples]:
        # The rest of the module needs neither Ray nor the preparation of data.
        from mhmoe_ray.data.encoder_samples import encoder_validation_samples

        return encoder_validation_samples(self.spec, manifest)

    @torch.no_grad()
    def validate(self, samples: Mapping[str, EncoderSamples]) -> Validation:
        names, weights, sums = list[str](), list[float](), list[Tensor]()
        for part in self.spec.parts:
            if part.name in samples:
                names += part.losses
                weights += [part.weight] * len(part.losses)
                sums.append(self._validate_part(part, samples[part.name]))
        sum_P2 = torch.cat(sums)
        part_losses = dict(zip(names, (sum_P2[:, 0] / sum_P2[:, 1].clamp(min=1)).tolist(), strict=True))
        return Validation(_weighted_mean(weights, sum_P2), int(sum_P2[:, 1].sum()), part_losses)

    def _validate_part(self, part: MicroBatchPart, samples: EncoderSamples) -> Tensor:
        """Return the sum and the number of targets of each loss of a part, (P, 2) float64, over all ranks."""
        total = evaluated_samples(part, samples)
        world, rank = self.mesh.world_size, self.mesh.rank
        sum_P2 = torch.zeros(len(part.losses), 2, dtype=torch.float64, device=self.device)
        for round_start in range(0, total, world * part.samples):
            start = min(total, round_start + rank * part.samples)
            stop = min(total, start + part.samples)
            # A rank without samples in the last round still takes part in every all-to-all, with no rows.
            batch = self._batch_maker.make([part._replace(samples=stop - start)], samples.rows(part, start, stop))
            sum_P2 += self.loss_sums(self.run(batch, None), batch).part_sums_P2
            self.environment.on_progress()
        if world > 1:
            dist.all_reduce(sum_P2)
        return sum_P2.cpu()


def _target_counts(groups: Iterable[Group]) -> list[int]:
    """Return the number of targets of each loss of a micro-batch."""
    return [count for group in groups for count in group.target_counts]


def _weighted_mean(weights: Iterable[float], sum_P2: Tensor) -> float:
    """Return the sum of the means of losses, each times its weight."""
    means: list[float] = (sum_P2[:, 0] / sum_P2[:, 1].clamp(min=1)).tolist()
    return sum(weight * mean for weight, mean in zip(weights, means, strict=True))
