"""The complete spec of a run, with the checks that concern several sections."""

from pathlib import Path
from typing import Any, Self

from pydantic import Field, NonNegativeInt, model_validator

from mhmoe_kernels.choice import ExpertSizes
from mhmoe_ray.errors import SpecError
from mhmoe_ray.spec.base import RunName, Section, StoragePath
from mhmoe_ray.spec.cluster import ClusterSpec, WorkerRange
from mhmoe_ray.spec.data import DataSpec, ImageSpec, absolute_path
from mhmoe_ray.spec.model import ModelSpec
from mhmoe_ray.spec.moe import MoESpec
from mhmoe_ray.spec.parts import (
    MicroBatchPart,
    Objective,
    check_encoder_parts,
    check_pairs,
    check_parts,
    check_vision_parts,
)
from mhmoe_ray.spec.serve import ServeSpec
from mhmoe_ray.spec.start import StartSpec
from mhmoe_ray.spec.train import DpoSpec, MaskingSpec, TrackingSpec, TrainSpec
from mhmoe_ray.storage import default_storage, location, resolve_path

NON_TRAINING_KEYS: dict[str, Any] = {"cluster": True, "serve": True, "tracking": True, "train": {"profile"}}
"""Sections and keys that do not change how a run trains, as pydantic excludes them."""


class ReferenceSpec(Section):
    """Reference model that `plan` compares the run's model with; only its mixture-of-experts layers differ."""

    name: str
    moe: MoESpec | None = None
    """Mixture-of-experts layers of the reference. By default the reference is the dense model."""


class RunSpec(Section):
    """Everything that determines a run: model, data, training, cluster, serving and tracking."""

    name: RunName
    """Name of the run, in lower-case letters, digits and dashes. Each submission adds a suffix of its own."""
    storage: StoragePath = Field(default_factory=lambda: location(default_storage()))
    """Folder of the run directories: a path, s3://bucket/folder or gs://bucket/folder. In all commands, --storage comes
    first, then this key if the command takes a spec, then the environment variable MHMOE_STORAGE, then runs."""
    seed: NonNegativeInt = 0
    """Seed of the initial weights and of the order of the data."""
    origin: str | None = None
    """Name of the preset that the spec is based on, for display only, because the other keys hold all values."""
    start: StartSpec | None = None
    """Model whose weights the run starts from. By default the first weights are random."""
    model: ModelSpec
    reference: ReferenceSpec | None = None
    data: DataSpec
    train: TrainSpec
    cluster: ClusterSpec = ClusterSpec()
    serve: ServeSpec = ServeSpec()
    tracking: TrackingSpec = TrackingSpec()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.model.moe is None:
            self._check_dense()
        else:
            self._check_experts(self.model.moe)
        if self.cluster.gather_precision == "bfloat16" and self.train.precision != "bfloat16":
            raise ValueError(
                "cluster.gather_precision bfloat16 would round the weights of products in float32: "
                "set train.precision to bfloat16 too"
            )
        if self.train.spikes and self.cluster.strategy.startswith("zero"):
            raise ValueError(
                f"train.spikes needs the norm before the update, which {self.cluster.strategy} does not give: set "
                "cluster.strategy to fsdp, or remove the key"
            )
        if self.train.ema_decay is not None and self.cluster.strategy.startswith("zero"):
            raise ValueError(
                f"train.ema_decay needs the weights after each update, which DeepSpeed holds with "
                f"{self.cluster.strategy}: set cluster.strategy to fsdp, or remove the key"
            )
        if self.train.moment_precision != "float32" and self.cluster.strategy.startswith("zero"):
            raise ValueError(
                f"train.moment_precision bfloat16 is for strategies ddp and fsdp, but DeepSpeed holds the moments of "
                f"{self.cluster.strategy}: set train.moment_precision to float32"
            )
        if self.train.expert_lr_ratio != 1 and self.model.moe is None:
            raise ValueError("train.expert_lr_ratio is for a model with experts, and would be ignored: remove it")
        self._check_adapter()
        check_parts(self)
        if self.model.encoder is None and self.train.masking != MaskingSpec():
            raise ValueError("train.masking is for a model with an encoder, and would be ignored: remove it")
        if self.model.encoder is not None:
            check_encoder_parts(self, self.model.encoder)
        elif self.model.vision is not None:
            check_vision_parts(self, self.model.vision)
        else:
            if self.data.has_images:
                raise ValueError("sources with images are for a model with an encoder: set model.encoder")
            if self.data.images != ImageSpec():
                raise ValueError("data.images is for a model with an encoder, and would be ignored: remove it")
        if not self.data.seq_len and self.model.vision is None:
            raise ValueError("data.seq_len is missing: the number of tokens in a sequence")
        if self.data.chat_sources:
            self._check_chat(self.data.chat_sources[0])
        if self.data.pair_sources:
            check_pairs(self)
        elif self.train.dpo != DpoSpec():
            raise ValueError("train.dpo is for sources of format preferences, and would be ignored: remove it")
        longest_sequence = self.model.architecture.longest_sequence
        if longest_sequence is not None and self.data.seq_len > longest_sequence:
            raise ValueError(
                f"data.seq_len is {self.data.seq_len}, but beyond {longest_sequence} tokens {self.model.backbone}'s "
                "positions grow past float32: lower it, or set model.backbone to llama"
            )
        for workers in (self.cluster.workers.min, self.cluster.workers.max):
            if self.train.micro_batches % workers:
                raise ValueError(
                    f"train.micro_batches ({self.train.micro_batches}) must be a multiple of cluster.workers "
                    f"({workers}), so that every worker gets equally many"
                )
        return self

    def _check_adapter(self) -> None:
        if self.train.adapter is None:
            return
        if self.start is None:
            raise ValueError("train.adapter adapts the weights of another model: name it in start.from")
        if self.start.optimizer:
            raise ValueError(
                "start.optimizer is true, but train.adapter has no earlier moments: remove start.optimizer"
            )
        if self.cluster.strategy.startswith("zero"):
            raise ValueError(
                f"train.adapter is for strategies ddp, fsdp and hybrid, and cluster.strategy is {self.cluster.strategy}"
            )
        if self.train.adapter.base_precision == "bfloat16" and self.train.precision != "bfloat16":
            raise ValueError(
                "train.adapter.base_precision bfloat16 would round the weights of products in float32: set "
                "train.precision to bfloat16 too"
            )
        self.train.adapter.check(self.model)

    def _check_dense(self) -> None:
        if self.cluster.ep > 1:
            raise ValueError(
                f"cluster.ep is {self.cluster.ep}, but a dense model has no experts to spread: set ep to 1"
            )
        if self.cluster.shard_experts:
            raise ValueError(
                "cluster.shard_experts is true, but a dense model has no experts to shard: set shard_experts to false"
            )
        if self.train.recompute == "experts":
            raise ValueError("train.recompute is experts, but a dense model has none: set it to none or block")

    def _check_experts(self, moe: MoESpec) -> None:
        ep, recompute = self.cluster.ep, self.train.recompute
        if moe.experts % ep:
            raise ValueError(f"model.moe.experts ({moe.experts}) must be a multiple of cluster.ep ({ep})")
        self._check_kernel(moe)
        if moe.kernel == "capacity" and ep > 1:
            raise ValueError(
                f"model.moe.kernel capacity holds all experts, but cluster.ep is {ep}: set ep to 1, or kernel to "
                "grouped, which drops the same routes"
            )
        if moe.router == "smear" and ep > 1:
            raise ValueError(
                f"model.moe.router smear averages all experts of a layer, but cluster.ep is {ep}: set ep to 1"
            )
        if moe.recompute not in (None, 1) and self._recomputes_experts:
            raise ValueError(
                f"model.moe.recompute is {moe.recompute:g}, but with train.recompute {recompute} and cluster.ep {ep} "
                "experts recompute all of their hidden rows, so it would be ignored: leave it out"
            )
        if recompute == "experts" and moe.kernel_limits.kept_rows == "all":
            raise ValueError(
                f"train.recompute is experts, but kernel {moe.kernel} keeps all hidden rows: set train.recompute to "
                "block, or model.moe.kernel to auto"
            )

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
                f"{self.train.precision}: change one of them"
            )

    @property
    def expert_sizes(self) -> ExpertSizes | None:
        """Sizes and type of the experts as one rank computes them in training; None for a dense model."""
        model, moe = self.model, self.model.moe
        if moe is None:
            return None
        return ExpertSizes(
            model.architecture.expert_function,
            self.train.precision,
            model.row_width,
            moe.d_expert,
            moe.experts // self.cluster.ep,
        )

    @property
    def is_random(self) -> bool:
        """True if training draws random numbers, as for dropout."""
        return self.model.is_random or (self.train.adapter is not None and self.train.adapter.dropout > 0)

    def check_compilation(self) -> None:
        """Raise a SpecError if the spec asks for torch.compile, but the model draws random numbers.

        Reading a spec does not include this check, so that specs of older runs can still be read.
        """
        if self.train.compile and self.is_random:
            reason = "it cannot compile random numbers that are the same for any number of workers"
            fix = (
                "set dropout, attention_dropout, moe.jitter, moe.noise and moe.expert_dropout of the model and "
                "train.adapter.dropout to 0 and moe.second_expert to always"
            )
            raise SpecError("train.compile", reason, f"{fix}, or train.compile to false")

    def _check_chat(self, source: str) -> None:
        if self.data.packing != "best_fit":
            raise ValueError(
                f"data.packing is {self.data.packing}, which cuts the conversations of data.sources.{source} anywhere: "
                "set it to best_fit"
            )
        if not self.model.document_masks:
            raise ValueError(
                f"model.document_masks is false, but data.sources.{source} has conversations, which would attend to "
                "others in the same sample: set it to true"
            )

    @property
    def reference_model(self) -> ModelSpec | None:
        """Reference model, which differs from the run's model in its expert layers."""
        return None if self.reference is None else self.model.with_moe(self.reference.moe)

    def changed_keys(self, previous_spec: Self) -> list[str]:
        """Return the top-level keys, without `NON_TRAINING_KEYS`, whose values differ."""
        previous_sections, current_sections = (
            spec.model_dump(mode="json", exclude=NON_TRAINING_KEYS) for spec in (previous_spec, self)
        )
        return [key for key in current_sections if current_sections[key] != previous_sections[key]]

    @property
    def micro_batch_key(self) -> str | None:
        """The key, with its value, for which micro-batches of another size have other losses; None without one."""
        moe, vision = self.model.moe, self.model.vision
        if moe is not None and moe.capacity_factor is not None:
            return f"model.moe.capacity_factor: {moe.capacity_factor:g}"
        if vision is not None and vision.adaptive is not None:
            return f"model.vision.adaptive.batches: {vision.adaptive.batches}"
        return next((f"data.parts.{p.name}.objective: {p.objective}" for p in self.parts if p.traits.compares), None)

    @property
    def worker_counts(self) -> list[int]:
        """Numbers of workers that the run may have, ascending; all workers compute equally many micro-batches."""
        step = self.cluster.shard_group or self.cluster.ep
        candidate_counts = range(self.cluster.workers.min, self.cluster.workers.max + 1, step)
        return [n for n in candidate_counts if self.train.micro_batches % n == 0]

    def with_workers(self, count: int) -> Self:
        """Return the spec with a fixed number of workers, one of its `worker_counts`."""
        cluster = self.cluster.model_copy(update={"workers": WorkerRange(min=count, max=count)})
        return self.model_copy(update={"cluster": cluster})

    @property
    def computed_model(self) -> ModelSpec:
        """Model with the share `moe.recompute` that is in effect in training."""
        moe = self.model.moe
        if moe is None or moe.kernel_limits.kept_rows != "as configured" or not self._recomputes_experts:
            return self.model
        return self.model.model_copy(update={"moe": moe.model_copy(update={"recompute": 1.0})})

    @property
    def _recomputes_experts(self) -> bool:
        # With `train.recompute: exchange` and expert parallelism, the recomputation of a block leaves out its experts,
        # which are spread over ranks, so the experts recompute their own rows.
        return self.train.recompute == "experts" or (self.train.recompute == "exchange" and self.cluster.ep > 1)

    @property
    def parts(self) -> list[MicroBatchPart]:
        """Parts of every micro-batch, those of a vision model in the order of its tasks; by default a nameless one."""
        if not self.data.parts:
            sources = tuple(self.data.sources)
            objective = "dpo" if self.data.pair_sources else "next_token"
            return [MicroBatchPart("", sources, self.train.micro_batch_size, objective, ("text",), 1.0)]
        default: Objective = "next_token" if self.model.encoder is None else "masked"
        tasks = self.model.vision.tasks if self.model.vision else {}
        return [
            MicroBatchPart(
                name,
                tuple(part.sources),
                part.micro_batch_size,
                tasks[name].objective if name in tasks else part.objective or default,
                self.data.sources[part.sources[0]].sample_columns,
                part.weight * (tasks[name].rate_ratio if name in tasks else 1),
                has_masks=name in tasks and (detector := tasks[name].detector) is not None and detector.masks,
            )
            for name, part in ((name, self.data.parts[name]) for name in tasks or self.data.parts)
        ]

    @property
    def has_codebook(self) -> bool:
        """True if a part predicts hidden patches as entries of a codebook, which `data prepare` makes."""
        encoder = self.model.encoder
        return (
            encoder is not None
            and encoder.image_targets == "codebook"
            and any(part.traits.hides and "image" in part.columns for part in self.parts)
        )

    def image_size_of(self, source: str) -> int:
        """Return the height and width in pixels of a source's images for the model; 0 if it reads none."""
        if self.model.vision is not None:
            sizes = [self.model.vision.tasks[part.name].image_size for part in self.parts if source in part.sources]
            return sizes[0] if sizes else 0
        return self.model.encoder.image_size if self.model.encoder else 0

    @property
    def loss_unit(self) -> str:
        """Unit of the loss for people; a loss in nats per token has a perplexity."""
        if self.data.pair_sources:
            return "nats per pair"
        return "nats per token" if self.model.family.predicts_next_token else "sum over all parts"

    @property
    def loss_names(self) -> list[str]:
        """Names of the losses of all parts, in order; without parts, those of the objective's figures."""
        return [name for part in self.parts for name in (part.losses if self.data.parts else part.traits.figures)]

    @property
    def samples_per_step(self) -> int:
        """Number of sequences per optimizer step: M micro-batches of b sequences."""
        return self.train.micro_batches * self.train.micro_batch_size

    @property
    def tokens_per_step(self) -> int:
        """Number of predicted tokens per optimizer step, with padding; see `tokens_per_micro_batch`."""
        return self.train.micro_batches * self.tokens_per_micro_batch

    @property
    def tokens_per_micro_batch(self) -> int:
        """Number of tokens in a micro-batch: b sequences of T, or the positions of all images and texts."""
        return sum(length * count for length, count in self._sample_lengths)

    @property
    def attention_length(self) -> float:
        """Length of the sample that a token or position belongs to, as a mean over all of them."""
        return sum(length**2 * count for length, count in self._sample_lengths) / self.tokens_per_micro_batch

    @property
    def samples_per_token(self) -> float:
        return self.samples_per_micro_batch / self.tokens_per_micro_batch

    @property
    def samples_per_micro_batch(self) -> int:
        """Number of samples in a micro-batch; attention is within one sample."""
        return sum(count for _, count in self._sample_lengths)

    @property
    def _sample_lengths(self) -> list[tuple[int, int]]:
        """Length in tokens and number of samples by part; a contrastive part has separate images and texts."""
        encoder, vision, lengths = self.model.encoder, self.model.vision, []
        if vision is not None:
            return [(vision.positions(vision.tasks[part.name]), part.samples) for part in self.parts]
        if encoder is None:
            return [(self.data.seq_len, self.train.micro_batch_size)]
        for part in self.parts:
            column_lengths = [
                encoder.image_tokens if name == "image" else self.data.seq_len
                for name in part.columns
                if name in ("image", "text")
            ]
            if part.is_joint:
                column_lengths = [sum(column_lengths)]
            lengths += [(length, part.pairs) for length in column_lengths]
        return lengths

    def with_absolute_paths(self, base: Path) -> Self:
        """Return the spec with local paths resolved against `base`."""
        data = self.data
        sources = {n: s.model_copy(update={"path": absolute_path(base, s.path)}) for n, s in data.sources.items()}
        update = {
            "sources": sources,
            "prepared": resolve_path(base, data.prepared),
            "tokenizer": data.tokenizer and resolve_path(base, data.tokenizer),
            "chat_template": data.chat_template and resolve_path(base, data.chat_template),
        }
        storage = resolve_path(base, self.storage)
        return self.model_copy(update={"storage": storage, "data": data.model_copy(update=update)})
