"""The `train` section (optimizer, learning-rate schedule, validation, checkpoints) and the `tracking` section."""

import math
from collections.abc import Collection
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator

from mhmoe_ray.spec.adapter import AdapterSpec
from mhmoe_ray.spec.base import OptionalStepCount, Precision, SampleCount, Section, StepCount, TokenCount, unmeasured

Beta = Annotated[float, Field(ge=0, lt=1)]
LOSS_CHUNKS_PER_PRODUCT = 4
"""Number of chunks (`train.loss_chunk_rows`) whose gradients enter one matrix product in bfloat16; in float32, which
needs twice the memory, each chunk has its own."""
Recompute = Literal["none", "experts", "exchange", "block"]


def _recompute_from_flag(value: object) -> object:
    """Convert a boolean, as specs of earlier versions have it, to a value of `recompute`."""
    return {True: "exchange", False: "none"}[value] if isinstance(value, bool) else value


MaskedShare = Annotated[float, Field(gt=0, lt=1)]


class MaskingSpec(Section):
    """Shares of texts and images that objective `masked` hides (BEiT-3, arXiv 2208.10442).

    Of hidden tokens, 80 % are replaced by the mask token, 10 % by random tokens, and 10 % stay (BERT).
    """

    text: MaskedShare = 0.15
    """Share of the tokens of a text that has no image."""
    image: MaskedShare = 0.4
    """Share of the patches of an image that has no text. Rectangular blocks of patches are hidden (BEiT v2)."""
    pair_text: MaskedShare = 0.5
    """Share of the tokens of a text with an image."""
    pair_image: MaskedShare = 0.4
    """Share of the patches of an image with a text."""

    def check_use(self, used_keys: Collection[str], patches: int) -> None:
        """Raise a ValueError if a share is set but not in `used_keys`, or hides none or all `patches` of an image."""
        for key, field in type(self).model_fields.items():
            share = getattr(self, key)
            if key not in used_keys and share != field.default:
                raise ValueError(
                    f"train.masking.{key} is {share}, but no part with objective masked has what it hides: remove it"
                )
            if key in used_keys and key.endswith("image") and not 0 < hidden_count(patches, share) < patches:
                amount = "none" if hidden_count(patches, share) == 0 else "all"
                raise ValueError(
                    f"train.masking.{key} is {share}, which hides {amount} of the {patches} patches of an image: "
                    "change it, or lower model.encoder.patch_size"
                )


def hidden_count(count: int, share: float) -> int:
    """Return the rounded number of patches or tokens to hide out of `count`, for a share from 0 to 1."""
    return math.floor(share * count + 0.5)


class DpoSpec(Section):
    """Direct preference optimization on pairs (arXiv 2305.18290, eq. 7), for sources of format `preferences`.

    The reward of an answer is beta times the logarithm of its probability over that of the model that the run starts
    from. These reference log-probabilities are computed once, at the run's start.
    """

    beta: PositiveFloat = 0.1
    """Weight of rewards: a larger one keeps the model nearer to the one that it starts from."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of pairs whose two answers are assumed to be swapped by mistake (conservative DPO)."""


class SpikeSpec(Section):
    """Steps whose updates are skipped: the loss or the gradient norm lies far above those of the last updates."""

    deviations: PositiveFloat = 6.0
    """Number of standard deviations above the mean that make a spike."""
    window: int = Field(default=128, ge=2)
    """Number of last updates whose mean and deviation count; before, no step is skipped."""


ProfiledSteps = Annotated[int, Field(ge=1, le=100)]
PROFILED_STEPS = 3


class ProfileSpec(Section):
    """Steps that torch's profiler records on every rank, which changes no loss (`mhmoe profile`)."""

    at: StepCount
    """First profiled step, counted from 1. A run that is resumed after this step has no such profile."""
    steps: ProfiledSteps = PROFILED_STEPS


class TrainSpec(Section):
    """Batches, precision, optimizer, learning-rate schedule, and intervals of validation and checkpoints."""

    steps: StepCount
    micro_batches: SampleCount
    """M: number of micro-batches in one optimizer step, over all workers together, whatever their number."""
    micro_batch_size: SampleCount
    """b: number of sequences in one micro-batch."""
    adapter: AdapterSpec | None = None
    """Adapter that is trained while the weights of `start.from` stay frozen; by default all weights are trained."""
    masking: MaskingSpec = MaskingSpec()
    """Shares of texts and images that are hidden from an encoder, which has to predict them."""
    dpo: DpoSpec = DpoSpec()
    """Direct preference optimization, for sources of format `preferences`."""
    precision: Annotated[Precision, unmeasured("fp8", "float8", "nvfp4")] = "float32"
    """Precision of training. bfloat16: autocast for matrix products; weights, router and loss stay float32. On CPUs it
    is faster with AMX or AMD's AVX512_BF16; on Intel's without AMX, products take twice as long as in float32."""
    residual_precision: Precision = "float32"
    """Precision of the residual stream between blocks. bfloat16 halves the memory of what recomputed blocks keep, and
    needs `precision` bfloat16. Norms still compute in float32."""
    recompute: Annotated[Recompute, BeforeValidator(_recompute_from_flag)] = "none"
    """Activation recomputation: part of what the forward pass computes is not kept, but computed again in the backward
    pass. none: everything is kept, except for `model.moe.recompute`. experts: the hidden rows of experts are not kept.
    exchange: a block keeps its input and, with expert parallelism, everything from its router on, so that no row
    (sub-token) is sent to experts on other ranks again; hidden rows of experts are not kept. block: a block keeps only
    its input; with expert parallelism its rows are sent once more. exchange and block take about a third more time. On
    GPUs the default is chosen to fit."""
    loss_chunk_rows: TokenCount | None = None
    """Number of tokens whose logits are in memory at a time, for the loss; by default all tokens of a micro-batch, and
    on GPUs chosen to fit. The logits of all tokens and their gradients are several times micro_batch_size * seq_len *
    vocab_size values. With a number, the gradient of the output layer is summed over chunks in float32."""
    compile: bool = False
    """If true, torch.compile compiles each block, except for the products of experts, which have kernels of their own,
    and the exchange of rows between ranks. Equal blocks share the compiled code. The model must draw no random numbers,
    such as those of dropout. In bfloat16, fewer intermediate values are rounded, so losses differ a little. On GPUs the
    default is true if the model draws no random numbers."""
    lr: PositiveFloat = 6e-4
    min_lr: float = Field(default=3e-5, ge=0)
    """Learning rate at the end of the schedule's decay. Schedule `constant` does not use it."""
    expert_lr_ratio: PositiveFloat = 1.0
    """Factor of the learning rate of routed experts."""
    warmup_steps: OptionalStepCount = Field(default_factory=lambda fields: min(375, fields.get("steps", 0) // 10))
    """Number of steps of linear warm-up from 0; by default 375, but at most a tenth of all steps."""
    schedule: Literal["linear", "cosine", "constant", "wsd"] = "linear"
    """Learning rate after the warm-up. linear: it decays linearly to min_lr at the last step. cosine: it decays to
    min_lr along half a cosine. constant: it stays at lr. wsd (warm-up, stable, decay): it stays at lr and decays
    linearly to min_lr over the last decay_steps steps."""
    decay_steps: StepCount | None = None
    """Number of steps of the decay of schedule `wsd`."""
    schedule_steps: StepCount | None = None
    """Step at which the decay ends; by default the last step. After it the learning rate stays at min_lr.
    `mhmoe resume --until` sets it, so that a longer run keeps the learning rates of its first steps."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Weight decay of matrices. Norms and biases have none."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: PositiveFloat = 1e-6
    moment_precision: Precision = "float32"
    """Precision of AdamW's two moments, for strategies ddp and fsdp. bfloat16 halves their size in memory and in
    checkpoints. They are then rounded stochastically, with random bits that do not depend on the number of workers.
    Updates are computed in float32."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Decay d of an exponential moving average of the weights, by default none: after update t it is d * average +
    (1 - d) * weights, with d at most (1 + t) / (10 + t). Validations and everything that reads a checkpoint use the
    average, and training itself does not. For strategies ddp, fsdp and hybrid."""
    clip_norm: float = Field(default=2.0, gt=0, allow_inf_nan=True)
    """Upper bound of the global gradient norm, over all ranks and experts. .inf: no clipping."""
    spikes: SpikeSpec | None = None
    """Skip the updates of spikes, by default of none. More than ten skipped steps in a row stop the run. For strategies
    ddp, fsdp and hybrid."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """Reaction to a step whose gradient is not finite. stop: stop the run. skip: skip the update and continue; more
    than ten skipped steps in a row stop the run too."""
    profile: ProfileSpec | None = None
    """Profile of some steps, by default of none. `mhmoe resume --set` may change it."""
    validate_every: StepCount = 100
    checkpoint_every: StepCount = 100
    keep_checkpoints: PositiveInt | None = None
    """Number of newest checkpoints to keep, in addition to the one with the lowest validation loss and those that
    applications and batch inferences use; by default all."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} is above lr {self.lr}")
        if self.profile and self.profile.at > self.steps:
            raise ValueError(f"profile.at {self.profile.at} is after the last of {self.steps} steps: lower it")
        if self.residual_precision == "bfloat16" and self.precision != "bfloat16":
            raise ValueError(
                "residual_precision bfloat16 would round a stream in float32: set precision to bfloat16 too"
            )
        if self.schedule == "wsd" and self.decay_steps is None:
            raise ValueError("schedule wsd needs decay_steps, the number of steps of its decay")
        if self.schedule != "wsd" and self.decay_steps is not None:
            raise ValueError(f"schedule {self.schedule} has no stable part, so decay_steps would be ignored")
        if self.decay_steps is not None and self.warmup_steps + self.decay_steps > self.last_decay_step:
            raise ValueError(
                f"warmup_steps ({self.warmup_steps}) and decay_steps ({self.decay_steps}) are more than "
                f"{self.last_decay_step} steps together"
            )
        if self.schedule == "constant" and self.schedule_steps is not None:
            raise ValueError("schedule constant has no decay, so schedule_steps would be ignored")
        return self

    @property
    def last_decay_step(self) -> int:
        """Step at which a decaying learning rate reaches min_lr."""
        return self.schedule_steps or self.steps

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of the schedule for step `step`, counted from 1."""
        if step <= self.warmup_steps:
            return self.lr * step / self.warmup_steps
        if self.schedule == "constant":
            return self.lr
        end = self.last_decay_step
        start = self.warmup_steps if self.decay_steps is None else end - self.decay_steps
        # If no steps follow the start of the decay, there is no decay. `max` then avoids a division by 0.
        progress = min(1.0, max(0.0, (step - start) / max(1, end - start)))
        if self.schedule == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return self.lr + (self.min_lr - self.lr) * progress


class TrackingSpec(Section):
    """Experiment tracking in addition to the metrics in the run directory."""

    mlflow: str | None = Field(default=None, min_length=1)
    """Address http(s)://host:port of an MLflow tracking server, or any other tracking URI of MLflow. The key needs the
    extra `mlflow`. Set the server's user name or token in MLflow's own environment variables, never here."""
    wandb: Literal["online", "offline"] | None = None
    """Weights & Biases, which needs the extra `wandb`. Online, workers need the environment variable WANDB_API_KEY, and
    WANDB_ENTITY and WANDB_BASE_URL where they differ from the defaults. Offline, the run directory has files for `wandb
    sync`."""
    experiment: str = Field(default="mhmoe", min_length=1)
    """Name of the MLflow experiment or W&B project that the run belongs to."""
    group: str | None = Field(default=None, min_length=1)
    """Name of the group of runs in MLflow (tag `mhmoe_group`) and W&B; by default the sweep that the run belongs to."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.mlflow and "@" in self.mlflow.partition("://")[2].partition("/")[0]:
            raise ValueError(
                "mlflow holds a user name, which everybody who reads the spec would see: set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD where workers run"
            )
        return self
