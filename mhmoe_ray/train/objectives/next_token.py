"""The objective of decoders: each token is predicted from those before it."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mhmoe_ray.data.samples import validation_samples
from mhmoe_ray.data.shards.columns import (
    EXPERT,
    TOKENS,
    ModelSamples,
    Samples,
    columns_of,
    join_columns,
    to_model_samples,
    token_bytes_for,
)
from mhmoe_ray.model.attention import document_indices, document_offsets
from mhmoe_ray.model.decoder import Decoder, DecoderLoss
from mhmoe_ray.model.loss import Targets
from mhmoe_ray.model.transfer import copy_to_device
from mhmoe_ray.model.trunk import Trunk
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.train.objectives.base import (
    Environment,
    LossSums,
    ModelArguments,
    Objective,
    Validation,
    array_digest,
)

if TYPE_CHECKING:
    from mhmoe_ray.data.shards.manifest import DataManifest
    from mhmoe_ray.data.tokenizer.vocabulary import Boundaries
    from mhmoe_ray.runs.directory import RunDir


class MicroBatch(NamedTuple):
    """Micro-batch of b samples: their token ids, and the targets that count."""

    token_BT: Tensor  # int64, (b, T + 1): T inputs, and T targets that are shifted by one
    counts_BT: Tensor  # bool, (b, T): False for padding and for tokens that are only read, such as a chat's question
    document_starts_BT: Tensor | None = None  # bool, (b, T); None if start tokens mark the first tokens of documents
    domain_B: Tensor | None = None  # int64, (b,): expert of each sample for router `domain`; None for other routers
    document_offset_N1: Tensor | None = None  # `document_offsets` of the input; None if attention reads a mask
    reference_B2: Tensor | None = None  # reference log-probabilities of the answers of pairs, float64, (b, 2)


def sample_digest(samples: Samples) -> int:
    """Return the digest of one micro-batch of samples, (b, T + 1), over its tokens and then its masks."""
    columns = columns_of(samples)
    return array_digest([columns.pop(TOKENS).astype("<i8"), *columns.values()])


def micro_batch(samples: ModelSamples, device: torch.device, masked_start_token: int | None = None) -> MicroBatch:
    """Return samples in CPU memory as a micro-batch on a device, without waiting for work that is queued there.
    `masked_start_token` precedes every document if attention is restricted to documents; a GPU then gets their
    offsets."""
    transfer = partial(copy_to_device, device=device)
    token_ids, target_mask, document_starts, experts = samples
    offset_N1 = None
    if masked_start_token is not None and device.type == "cuda":
        starts = token_ids[:, :-1] == masked_start_token if document_starts is None else document_starts
        offset_N1 = document_offsets(torch.from_numpy(starts)).numpy()
    return MicroBatch(
        transfer(token_ids),
        transfer(target_mask),
        None if document_starts is None else transfer(document_starts),
        None if experts is None else transfer(experts),
        None if offset_N1 is None else transfer(offset_N1),
    )


def map_rows(batch: MicroBatch, function: Callable[[Tensor], Tensor]) -> MicroBatch:
    """Return a micro-batch with `function` applied to each of its tensors that has one row per sample."""
    token_BT, counts_BT, document_starts_BT, domain_B = batch[:4]
    return MicroBatch(
        function(token_BT),
        function(counts_BT),
        None if document_starts_BT is None else function(document_starts_BT),
        None if domain_B is None else function(domain_B),
    )


class NextToken(Objective[MicroBatch, DecoderLoss]):
    """Objective of decoders: predict each token from those before it. Every target that counts has the same weight in
    the loss, however much padding its micro-batch has."""

    weights = (1.0,)

    def __init__(self, environment: Environment, model: Trunk, inputs: "Boundaries | None" = None) -> None:
        """Create the objective; `inputs` are needed if the model has `document_masks`."""
        super().__init__(environment, model)
        assert isinstance(model, Decoder)
        model.loss_chunk_rows = self.spec.train.loss_chunk_rows
        self.rows_per_micro_batch = self.spec.train.micro_batch_size
        self._boundaries = inputs
        self._token_bytes = token_bytes_for(self.spec.model.vocab_size)
        self._part_sizes = [part.micro_batch_size for part in self.spec.data.parts.values()]

    @staticmethod
    def load_inputs(run: "RunDir", spec: RunSpec, manifest: "DataManifest") -> "Boundaries":
        # These imports are delayed, because the measurements of layers and steps run without the tokenizers library.
        from mhmoe_ray.data.tokenizer.load import load_tokenizer
        from mhmoe_ray.data.tokenizer.vocabulary import boundaries

        return boundaries(load_tokenizer(run.tokenizer_file, spec.model.vocab_size))

    def extra_ends(self, manifest: "DataManifest") -> set[int]:
        if manifest.chat is None:
            return set()
        assert self._boundaries is not None
        return set(manifest.chat.turn_ends) - self._boundaries.ends

    @property
    def _start_token(self) -> int | None:
        return None if self._boundaries is None else self._boundaries.start

    def receive(self, rows: Mapping[str, np.ndarray]) -> tuple[int, MicroBatch]:
        stored = join_columns(rows)
        return sample_digest(stored), self._micro_batch(stored, rows.get(EXPERT))

    def _micro_batch(self, stored: Samples, experts: np.ndarray | None) -> MicroBatch:
        samples = to_model_samples(stored, self._token_bytes)._replace(experts=experts)
        masked_start_token = self._start_token if self.spec.model.document_masks else None
        return micro_batch(samples, self.device, masked_start_token)

    def count_targets(self, batches: Iterable[MicroBatch]) -> tuple[Iterable[MicroBatch], list[int], int]:
        # With packing "concat", samples have no padding, so the number of targets follows from the spec. The
        # micro-batches then need not be read before the first forward pass.
        if self.spec.data.packing == "concat":
            targets = self.spec.tokens_per_step
            return batches, [targets], targets
        batches = list(batches)
        count = torch.stack([batch.counts_BT.sum() for batch in batches]).sum()
        if self.mesh.world_size > 1:
            with self.environment.wait_timer.measure(self.device):
                dist.all_reduce(count)
        return batches, [int(count)], int(count)

    def model_arguments(self, batch: MicroBatch) -> ModelArguments:
        """Return the arguments of the model, which reads all tokens but the last of each sample."""
        token_BT, document_starts_BT = batch.token_BT[:, :-1], batch.document_starts_BT
        document_BT = None
        if self.spec.model.document_masks:
            if document_starts_BT is None:
                assert self._start_token is not None
                # Padding is token 0, which may also be the start token, so padding may seem to begin new documents.
                # This does no harm: padding lies at the end of a sample, where no target counts.
                document_starts_BT = token_BT.eq(self._start_token)
            document_BT = document_indices(document_starts_BT)
        keywords = {
            "document_BT": document_BT,
            "domain_B": batch.domain_B,
            "targets": Targets(batch.token_BT[:, 1:], batch.counts_BT),
            "document_offset_N1": batch.document_offset_N1,
        }
        return ModelArguments((token_BT,), keywords)

    def loss_sums(self, output: DecoderLoss, batch: MicroBatch) -> LossSums:
        loss, loss_BT = output.loss
        part_sums_P2 = torch.zeros(0, 2, dtype=torch.float64, device=self.device)
        if self._part_sizes:
            values_2B = torch.stack([t.sum(1, dtype=torch.float64) for t in (loss_BT.detach(), batch.counts_BT)])
            part_sums_P2 = torch.stack([part.sum(1) for part in torch.split(values_2B, self._part_sizes, 1)])
        return LossSums([loss], part_sums_P2)

    def step_loss(self, loss: float, targets: int, part_sums_P2: Tensor) -> float:
        # A step that consists only of padding has no targets. `max` then avoids the division of 0 by 0.
        return loss / max(1, targets)

    def load_validation(self, manifest: "DataManifest") -> dict[str, MicroBatch]:
        """Return the held-out samples of each part that has any, by its name; "" is the only name without
        `data.parts`."""
        spec, batches = self.spec, {}
        for part in spec.parts:
            sources = part.sources if part.name else None
            samples = validation_samples(
                spec.data.prepared, manifest, spec.model.moe, sources, spec.cluster.shard_cache
            )
            if len(samples.token_ids) or not part.name:
                batches[part.name] = micro_batch(samples, torch.device("cpu"))
        return batches

    def validate(self, samples: dict[str, MicroBatch]) -> Validation:
        losses = {name: self.validate_part(batch) for name, batch in samples.items()}
        tokens = sum(token_count for _, token_count in losses.values())
        if not self.spec.data.parts:
            [(loss, _)] = losses.values()
            return Validation(loss, tokens, {})
        loss = sum(loss * token_count for loss, token_count in losses.values()) / tokens
        return Validation(loss, tokens, {name: loss for name, (loss, _) in losses.items()})

    def _take_rows(self, part: Tensor, start: int, count: int) -> Tensor:
        return part[start : start + count].to(self.device)

    @torch.no_grad()
    def validate_part(self, samples: MicroBatch) -> tuple[float, int]:
        """Return the mean loss in nats over a part's held-out tokens, and their number, both equal on every rank.

        With static routing, routes above the expert capacity are dropped as in training. The code of the first paper
        (arXiv 2404.15045) does the same: its evaluation capacity is `-1`, which stands for the capacity of training.
        The package `evaluate` drops no routes. Every rank passes the same samples.
        """
        b, world = self.spec.train.micro_batch_size, self.mesh.world_size
        sample_count = len(samples.token_BT)
        batch_count = -(-sample_count // (b * world))
        padding_rows = batch_count * b * world - sample_count
        # Copies of the first sample, which do not count in the mean, fill the last round, so that every rank takes part
        # in every all-to-all.
        padded = map_rows(samples, lambda part: torch.cat([part, part[:1].expand(padding_rows, *part.shape[1:])]))
        padded.counts_BT[sample_count:] = False
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        for i in range(batch_count):
            start = (i * world + self.mesh.rank) * b
            batch = map_rows(padded, partial(self._take_rows, start=start, count=b))
            loss_BT = self.environment.run_model(batch).loss.token_BT
            total += torch.stack([t.sum(dtype=torch.float64) for t in (loss_BT, batch.counts_BT)])
            self.environment.on_progress()
        if world > 1:
            dist.all_reduce(total)
        return float(total[0] / total[1]), int(total[1])
