"""The objectives of encoders: hidden patches and tokens are predicted, and images are matched with their texts.

Each part of a micro-batch is a group of the encoder's batch, and has one loss for its patches, one for its tokens, or
one for its pairs. The loss of a step is the sum over these losses of the part's weight times the mean over all their
targets, so a part counts equally whatever the number of its targets. The pairs of a contrastive part are compared within
a micro-batch, so their loss does not depend on the number of ranks.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mhmoe_ray.data.encoder_samples import EncoderSamples, encoder_validation_samples
from mhmoe_ray.data.shards.columns import padding_token, token_bytes_for
from mhmoe_ray.data.shards.manifest import DataManifest
from mhmoe_ray.model.encoder import EncoderBatch, EncoderLoss, Group, GroupSize, LossKind, image_patches
from mhmoe_ray.model.noise import Noise
from mhmoe_ray.spec import MicroBatchPart, RunSpec
from mhmoe_ray.train.objectives.base import Environment, LossSums, Objective, Validation
from mhmoe_ray.train.objectives.next_token import DIGEST_BYTES, copy_to_device


def encoder_digest(samples: EncoderSamples) -> int:
    """Return the digest of a micro-batch: of its crops, its tokens, and the masks of both."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for column in samples:
        digest.update(np.ascontiguousarray(column).tobytes())
    return int.from_bytes(digest.digest(), "little")


def normalized_patches(patch_IV: Tensor) -> Tensor:
    """Return patches of which each is normalized by the mean and the standard deviation of its values (MAE, arXiv
    2111.06377)."""
    # torch warns about the variance of nothing.
    if not len(patch_IV):
        return patch_IV
    variance_I1, mean_I1 = torch.var_mean(patch_IV, dim=-1, keepdim=True)
    return (patch_IV - mean_I1) / (variance_I1 + 1e-6).sqrt()


class BatchMaker:
    """Maker of micro-batches of an encoder from samples in CPU memory."""

    def __init__(self, spec: RunSpec, device: torch.device, codebook: np.ndarray | None = None) -> None:
        """Create the maker.

        Args:
            spec: spec of the run.
            device: device of the micro-batches.
            codebook: entries of the codebook, float32 (entries, values), if patches are predicted as entries.
        """
        assert spec.model.encoder is not None
        self._patch_size, self._device = spec.model.encoder.patch_size, device
        self._padding = padding_token(token_bytes_for(spec.model.vocab_size))
        self._codebook = None if codebook is None else copy_to_device(codebook, device)

    def make(self, parts: Iterable[MicroBatchPart], samples: EncoderSamples) -> EncoderBatch:
        """Return the micro-batch of samples; its targets are computed on the device.

        Args:
            parts: the parts, with the number of samples that each has here.
            samples: their samples.
        """
        transfer = partial(copy_to_device, device=self._device)
        hidden_patch_I, hidden_token_J = (
            np.flatnonzero(mask) for mask in (samples.patch_hidden, samples.token_hidden)
        )
        is_token = samples.inputs != self._padding
        token_NT = np.where(is_token, samples.inputs, 0).astype(np.int64)
        target_J = samples.tokens.ravel()[hidden_token_J].astype(np.int64)
        image_NYXC, patch_I = transfer(samples.images), transfer(hidden_patch_I)
        return EncoderBatch(
            tuple(_groups(parts, samples)),
            image_NYXC,
            transfer(samples.patch_hidden),
            transfer(token_NT),
            transfer(is_token),
            patch_I,
            self._patch_targets(image_NYXC, patch_I),
            transfer(hidden_token_J),
            transfer(target_J),
        )

    def _patch_targets(self, image_NYXC: Tensor, hidden_patch_I: Tensor) -> Tensor:
        hidden_IV = image_patches(image_NYXC, self._patch_size).flatten(0, 1)[hidden_patch_I]
        target_IV = normalized_patches(hidden_IV)
        return target_IV if self._codebook is None else torch.cdist(target_IV, self._codebook).argmin(1)


def _groups(parts: Iterable[MicroBatchPart], samples: EncoderSamples) -> Iterator[Group]:
    """Yield the group of each part of a micro-batch."""
    first_image = first_text = 0
    for part in parts:
        images, texts = (part.samples * (column in part.columns) for column in ("image", "text"))
        patch_hidden = samples.patch_hidden[first_image : first_image + images]
        token_hidden = samples.token_hidden[first_text : first_text + texts]
        first_image, first_text = first_image + images, first_text + texts
        is_contrastive = part.objective == "contrastive"
        is_joint = len(part.columns) > 1 and not is_contrastive
        losses: tuple[LossKind, ...] = ("match",) if is_contrastive else part.columns
        size = GroupSize(images, texts, is_joint)
        yield Group(size, int(patch_hidden.sum()), int(token_hidden.sum()), losses)


class Masked(Objective[EncoderBatch, EncoderLoss]):
    """Objective of encoders: the parts of a micro-batch with their objectives."""

    rows_per_micro_batch = 1

    def __init__(self, environment: Environment, codebook: np.ndarray | None = None) -> None:
        super().__init__(environment)
        self._batch_maker = BatchMaker(self.spec, self.device, codebook)
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

    def load_validation(self, manifest: DataManifest) -> Mapping[str, EncoderSamples]:
        return encoder_validation_samples(self.spec, manifest)

    @torch.no_grad()
    def validate(self, samples: Mapping[str, EncoderSamples]) -> Validation:
        names, weights, sums = [], [], []
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
        total = max(len(samples.images), len(samples.tokens))
        if part.objective == "contrastive" and total > part.samples:
            # A smaller micro-batch at the end would have fewer pairs to choose from, and so a smaller loss.
            total -= total % part.samples
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
    return sum(weight * total / max(1, count) for weight, (total, count) in zip(weights, sum_P2.tolist(), strict=True))
