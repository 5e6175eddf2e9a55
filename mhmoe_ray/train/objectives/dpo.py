"""The objective of pairs: direct preference optimization (arXiv 2305.18290), by which chosen answers become likelier.

A loss needs each reference log-probability: the logarithm of an answer's probability under the weights of step 0. All
ranks compute these at the run's start, each a share of the pairs, and `reference.arrow` of the run directory keeps them
with the hash of the manifest of checkpoint 0, which has those of its weights and of the data. Checkpoints have the hash
of the file, so that a resumed run reads the same numbers on any number of workers.
"""

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mhmoe_ray.data.samples import domain_experts
from mhmoe_ray.data.shards.cache import plan_cache
from mhmoe_ray.data.shards.columns import SAMPLE
from mhmoe_ray.data.shards.files import file_content
from mhmoe_ray.data.shards.reader import ShardReader
from mhmoe_ray.errors import CheckpointError
from mhmoe_ray.model.attention import document_indices
from mhmoe_ray.model.decoder import DecoderLoss
from mhmoe_ray.model.transfer import copy_to_device
from mhmoe_ray.model.trunk import Trunk
from mhmoe_ray.runs import events, metrics
from mhmoe_ray.runs.directory import report_read_errors
from mhmoe_ray.storage import read_file, replace_file, report_write_errors
from mhmoe_ray.train.objectives.base import Environment, LossSums, Validation
from mhmoe_ray.train.objectives.next_token import MicroBatch, NextToken, map_rows

if TYPE_CHECKING:
    from mhmoe_ray.checkpoint.manifest import CheckpointManifest
    from mhmoe_ray.data.shards.manifest import DataManifest
    from mhmoe_ray.data.tokenizer.vocabulary import Boundaries
    from mhmoe_ray.runs.directory import RunDir

_SHA256 = "reference_sha256"


def answer_log_probabilities(loss_BT: Tensor, batch: MicroBatch) -> Tensor:
    """Return the log-probabilities of the chosen and the rejected answer of each pair, float64, (b, 2)."""
    assert batch.document_starts_BT is not None
    document_BT = document_indices(batch.document_starts_BT)
    is_chosen_BT = document_BT == document_BT[:, :1]
    return -torch.stack([torch.where(part, loss_BT.double(), 0).sum(1) for part in (is_chosen_BT, ~is_chosen_BT)], 1)


class DirectPreference(NextToken):
    """Objective of pairs. The loss of a step is a mean over its pairs, each of which is a sample."""

    part_metric, val_part_metric = metrics.REWARDS, metrics.VAL_REWARDS

    def __init__(self, environment: Environment, model: Trunk, inputs: "Boundaries | None" = None) -> None:
        super().__init__(environment, model, inputs)
        self._sha256: str | None = None
        self.references = np.empty((0, 2))
        """Reference log-probabilities of all training pairs, domain after domain, and then of the held-out ones."""

    def receive(self, rows: Mapping[str, np.ndarray]) -> tuple[int, MicroBatch]:
        digest, batch = super().receive(rows)
        return digest, batch._replace(reference_B2=copy_to_device(self.references[rows[SAMPLE]], self.device))

    def count_targets(self, batches: Iterable[MicroBatch]) -> tuple[Iterable[MicroBatch], list[int], int]:
        batches, _, tokens = super().count_targets(batches)
        return batches, [self.spec.samples_per_step], tokens

    def loss_sums(self, output: DecoderLoss, batch: MicroBatch) -> LossSums:
        loss_B, figures_PB = self._score(answer_log_probabilities(output.loss.token_BT, batch), batch)
        counts_P = figures_PB.new_full((len(figures_PB),), len(loss_B))
        return LossSums([loss_B.sum().float()], torch.stack([figures_PB.sum(1), counts_P], 1))

    def _score(self, log_probability_B2: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Return the loss of each pair (eq. 7), and its figures in the order of `ObjectiveTraits.figures`."""
        assert batch.reference_B2 is not None
        dpo = self.spec.train.dpo
        chosen_B, rejected_B = (dpo.beta * (log_probability_B2 - batch.reference_B2)).unbind(1)
        margin_B = chosen_B - rejected_B
        loss_B = -(1 - dpo.label_smoothing) * F.logsigmoid(margin_B) - dpo.label_smoothing * F.logsigmoid(-margin_B)
        return loss_B, torch.stack([chosen_B, rejected_B, margin_B, (margin_B > 0).double()]).detach()

    def step_loss(self, loss: float, targets: int, part_sums_P2: Tensor) -> float:
        return loss / self.spec.samples_per_step

    @property
    def state(self) -> dict[str, Any]:
        return {_SHA256: self._sha256}

    def load_state(self, state: Mapping[str, Any] | None) -> None:
        self._sha256 = state[_SHA256] if state else None

    def prepare(
        self, run: "RunDir", manifest: "DataManifest", start: "CheckpointManifest | None", fence: Callable[[], object]
    ) -> None:
        """Read the reference log-probabilities, or compute and write them if no step has been trained with any."""
        assert start is not None, "a run on pairs starts from a model"
        file, start_sha256 = run.reference_file, hashlib.sha256(start.model_dump_json().encode()).hexdigest()
        with report_read_errors(file):
            content = read_file(file) if file.exists() else b""
        sha256 = hashlib.sha256(content).hexdigest()
        if self._sha256 is not None and sha256 != self._sha256:
            reason = "it is not the file of reference log-probabilities with which the run began"
            raise CheckpointError(str(file), reason if content else "it is missing", "restore it, or submit a new run")
        if self._sha256 is None and not self._all_ranks(_note_of(content) == start_sha256):
            begin = time.monotonic()
            references = self._compute(manifest)
            content = _encode(references, start_sha256)
            if self.mesh.rank == 0:
                fence()
                with report_write_errors(file):
                    replace_file(file, content)
                held_out = len(references) - sum(domain.samples for domain in manifest.domains.values())
                pairs, seconds = len(references) - held_out, time.monotonic() - begin
                events.record(run, "referenced", pairs=pairs, held_out=held_out, seconds=seconds)
            sha256 = hashlib.sha256(content).hexdigest()
        self._sha256, self.references = sha256, _decode(content)

    def _all_ranks(self, flag: bool) -> bool:
        value = torch.tensor(int(flag), device=self.device)
        if self.mesh.world_size > 1:
            dist.all_reduce(value, dist.ReduceOp.MIN)
        return bool(value)

    def _compute(self, manifest: "DataManifest") -> np.ndarray:
        """Return `references`, computed from the present weights."""
        spec = self.spec
        cache = plan_cache(spec.data.prepared, manifest, spec.cluster.shard_cache)
        experts = domain_experts(spec.model.moe, list(manifest.domains))
        parts = []
        for index, domain in enumerate(manifest.domains.values()):
            reader = ShardReader(spec.data.prepared, domain.shards, manifest.token_bytes, cache)
            parts.append(self._log_probabilities(len(reader), partial(self._read, reader, experts, index)))
        held_out = self._held_out(manifest)
        parts.append(self._log_probabilities(len(held_out.token_BT), partial(self._take, held_out)))
        return np.concatenate(parts)

    def _read(self, reader: ShardReader, experts: np.ndarray | None, domain: int, numbers: np.ndarray) -> MicroBatch:
        # A domain without an expert has no training samples, so any expert does.
        expert_B = None if experts is None else np.full(len(numbers), max(0, experts[domain]))
        return self._micro_batch(reader.read(numbers), expert_B)

    def _take(self, samples: MicroBatch, numbers: np.ndarray) -> MicroBatch:
        return map_rows(samples, lambda part: part[numbers].to(self.device))

    @torch.no_grad()
    def _log_probabilities(self, count: int, read: Callable[[np.ndarray], MicroBatch]) -> np.ndarray:
        """Return the log-probabilities of both answers of `count` pairs; ranks take turns with the micro-batches."""
        b, world = self.spec.train.micro_batch_size, self.mesh.world_size
        rounds = -(-count // (b * world))
        result_N2 = torch.zeros(rounds * world * b, 2, dtype=torch.float64, device=self.device)
        for i in range(rounds):
            start = (i * world + self.mesh.rank) * b
            # The last pair fills up the last round, so that every rank takes part in every all-to-all.
            batch = read(np.minimum(np.arange(start, start + b), count - 1))
            loss_BT = self.environment.run_model(batch).loss.token_BT
            result_N2[start : start + b] = answer_log_probabilities(loss_BT, batch)
            self.environment.on_progress()
        if world > 1:
            dist.all_reduce(result_N2)
        return result_N2[:count].cpu().numpy()

    def _held_out(self, manifest: "DataManifest") -> MicroBatch:
        [samples] = super().load_validation(manifest).values()
        return samples

    def load_validation(self, manifest: "DataManifest") -> dict[str, MicroBatch]:
        samples = self._held_out(manifest)
        references = self.references[len(self.references) - len(samples.token_BT) :]
        return {"": samples._replace(reference_B2=torch.from_numpy(references))}

    def validate(self, samples: dict[str, MicroBatch]) -> Validation:
        [batch] = samples.values()
        log_probabilities = self._log_probabilities(len(batch.token_BT), partial(self._take, batch))
        loss_N, figures_PN = self._score(torch.from_numpy(log_probabilities), batch)
        figures = dict(zip(self.spec.loss_names, figures_PN.mean(1).tolist(), strict=True))
        return Validation(float(loss_N.mean()), int(batch.counts_BT.sum()), figures)


def _encode(references: np.ndarray, start_sha256: str) -> bytes:
    fields = [pa.field(name, pa.float64(), nullable=False) for name in ("chosen", "rejected")]
    schema = pa.schema(fields, metadata={"start_sha256": start_sha256})
    return bytes(file_content(pa.record_batch([pa.array(column) for column in references.T], schema=schema)))


def _note_of(content: bytes) -> str | None:
    """Return the hash of the start that a file's content notes; None if it is empty or damaged."""
    try:
        metadata: dict[bytes, bytes] = pa.ipc.open_file(pa.BufferReader(content)).schema.metadata
    except pa.ArrowInvalid:
        return None
    return metadata[b"start_sha256"].decode()


def _decode(content: bytes) -> np.ndarray:
    batch = pa.ipc.open_file(pa.BufferReader(content)).get_batch(0)
    return np.stack([column.to_numpy() for column in batch.columns], axis=1)
