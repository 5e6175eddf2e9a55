"""The complete spec, which alone describes a run."""

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, NonNegativeInt, PlainSerializer, PlainValidator, model_validator

from mhmoe_ray.spec.base import Section
from mhmoe_ray.spec.cluster import ClusterSpec, WorkerRange
from mhmoe_ray.spec.data import DataSpec, absolute
from mhmoe_ray.spec.model import ModelSpec, MoESpec
from mhmoe_ray.spec.serve import ServeSpec
from mhmoe_ray.spec.train import TrackingSpec, TrainSpec
from mhmoe_ray.storage import Location, ObjectPath, location


def _location(given: Any) -> Location:
    if not isinstance(given, str | Path | ObjectPath):
        raise ValueError("it must be a path, s3://bucket/folder or gs://bucket/folder")
    return location(given)


StoragePath = Annotated[Location, PlainValidator(_location), PlainSerializer(str)]
ELSEWHERE = {"cluster", "serve", "tracking"}
"""Names of the sections that do not change what a run trains."""
NAME_LENGTH = 41
NAME = rf"^[a-z0-9][a-z0-9-]{{0,{NAME_LENGTH - 1}}}$"


class ReferenceSpec(Section):
    """Model that `plan` compares the model with: other expert layers on the same trunk."""

    name: str
    moe: MoESpec | None = None
    """Expert layers of the reference; by default it is the dense model."""


class RunSpec(Section):
    name: str = Field(pattern=NAME)
    """Name of the run: lower-case letters, digits and dashes. Each submission gets a suffix of its own."""
    storage: StoragePath = Path("runs")
    """Folder that holds run directories: a path, s3://bucket/folder or gs://bucket/folder."""
    seed: NonNegativeInt = 0
    """Seed of the initial weights and of the order of the data."""
    origin: str | None = None
    """Name of the preset that the spec came from, for display; the other keys hold all values, including those that
    were overridden."""
    model: ModelSpec
    reference: ReferenceSpec | None = None
    data: DataSpec
    train: TrainSpec
    cluster: ClusterSpec = ClusterSpec()
    serve: ServeSpec = ServeSpec()
    tracking: TrackingSpec = TrackingSpec()

    @model_validator(mode="after")
    def _check(self) -> Self:
        moe = self.model.moe
        if self.cluster.ep > 1 and moe is None:
            raise ValueError(
                f"cluster.ep is {self.cluster.ep}, but a dense model has no experts to spread: set ep to 1"
            )
        if self.cluster.shard_experts and moe is None:
            raise ValueError(
                "cluster.shard_experts is true, but a dense model has no experts to slice: set shard_experts to false"
            )
        if moe is not None and moe.experts % self.cluster.ep:
            raise ValueError(f"model.moe.experts ({moe.experts}) must be a multiple of cluster.ep ({self.cluster.ep})")
        if moe is not None:
            self._check_kernel(moe)
        if moe is not None and moe.kernel == "capacity" and self.cluster.ep > 1:
            raise ValueError(
                f"model.moe.kernel capacity holds all experts, but cluster.ep is {self.cluster.ep}: "
                "set ep to 1, or kernel to grouped, which drops the same routes"
            )
        if moe is not None and moe.recompute not in (None, 1) and self.train.recompute and self.cluster.ep > 1:
            raise ValueError(
                f"model.moe.recompute is {moe.recompute:g}, but with train.recompute and cluster.ep {self.cluster.ep} "
                "experts compute all of their hidden rows anew, so it would be ignored: leave it out"
            )
        longest = self.model.architecture.longest_sequence
        if longest is not None and self.data.seq_len > longest:
            raise ValueError(
                f"data.seq_len is {self.data.seq_len}, but beyond {longest} tokens {self.model.backbone}'s "
                "positions grow past float32: lower it, or set model.backbone to llama"
            )
        for workers in (self.cluster.workers.min, self.cluster.workers.max):
            if self.train.micro_batches % workers:
                raise ValueError(
                    f"train.micro_batches ({self.train.micro_batches}) must be a multiple of cluster.workers "
                    f"({workers}), so that every worker gets equally many"
                )
        return self

    def _check_kernel(self, moe: MoESpec) -> None:
        limits, gpus = moe.kernel_limits, self.cluster.gpus_per_worker
        if limits.device == "CUDA" and not gpus:
            raise ValueError(
                f"model.moe.kernel {moe.kernel} needs CUDA, but cluster.gpus_per_worker is 0: "
                "set that to 1, or kernel to auto"
            )
        if limits.device == "CPUs" and gpus:
            raise ValueError(
                f"model.moe.kernel {moe.kernel} is for CPUs, but cluster.gpus_per_worker is {gpus}: set kernel to auto"
            )
        if limits.precision not in (None, self.train.precision):
            raise ValueError(
                f"model.moe.kernel {moe.kernel} computes in {limits.precision}, but train.precision is "
                f"{self.train.precision}: set either"
            )

    @property
    def reference_model(self) -> ModelSpec | None:
        """The reference's expert layers on this model's trunk; None without a reference."""
        return None if self.reference is None else self.model.with_moe(self.reference.moe)

    def changed_from(self, before: Self) -> list[str]:
        """Return the keys and sections in which this spec would train something else than an earlier one."""
        then, now = (spec.model_dump(mode="json", exclude=ELSEWHERE) for spec in (before, self))
        return [key for key in now if now[key] != then[key]]

    @property
    def worker_counts(self) -> list[int]:
        """Numbers of workers that the run may have, ascending; with each of them, all workers get the same number of
        micro-batches."""
        wanted = range(self.cluster.workers.min, self.cluster.workers.max + 1, self.cluster.ep)
        return [n for n in wanted if self.train.micro_batches % n == 0]

    def with_workers(self, count: int) -> Self:
        """Return the same spec with a fixed number of workers, one of its `worker_counts`."""
        cluster = self.cluster.model_copy(update={"workers": WorkerRange(min=count, max=count)})
        return self.model_copy(update={"cluster": cluster})

    @property
    def computed_model(self) -> ModelSpec:
        """The model as training computes it.

        With `train.recompute` and expert parallelism, blocks are recomputed without their spread experts, so the
        experts recompute their own hidden layers (`moe.recompute` is 1), if the kernel supports it.
        """
        moe = self.model.moe
        if moe is None or not self.train.recompute or self.cluster.ep == 1 or moe.kernel_limits.keeps != "as told":
            return self.model
        return self.model.model_copy(update={"moe": moe.model_copy(update={"recompute": 1.0})})

    @property
    def samples_per_step(self) -> int:
        """Number of sequences per step: M x b."""
        return self.train.micro_batches * self.train.micro_batch_size

    @property
    def tokens_per_step(self) -> int:
        """Number of predicted tokens per step: M x b x T; with best-fit packing this includes padding."""
        return self.samples_per_step * self.data.seq_len

    @property
    def tokens_per_micro_batch(self) -> int:
        """Number of tokens of one worker's micro-batch: b x T."""
        return self.train.micro_batch_size * self.data.seq_len

    def with_absolute_paths(self, base: Path) -> Self:
        """Return the same spec with its relative paths taken from `base`, the directory in which the command was
        called."""
        data = self.data
        sources = {n: s.model_copy(update={"path": absolute(base, s.path)}) for n, s in data.sources.items()}
        update = {
            "sources": sources,
            "prepared": base / data.prepared,
            "tokenizer": base / data.tokenizer if data.tokenizer else None,
        }
        storage = base / self.storage if isinstance(self.storage, Path) else self.storage
        return self.model_copy(update={"storage": storage, "data": data.model_copy(update=update)})
