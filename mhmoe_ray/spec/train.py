"""The `train` section: the optimizer, its schedule, and how often to validate and to save; also `tracking`."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from mhmoe_ray.spec.base import Section

Beta = Annotated[float, Field(ge=0, lt=1)]


class TrainSpec(Section):
    steps: PositiveInt
    micro_batches: PositiveInt
    """M: micro-batches in one optimizer step, over all workers. The global batch never depends on the workers."""
    micro_batch_size: PositiveInt
    """b: sequences in one micro-batch."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: autocast for matrix products; weights, router and loss stay float32. On a CPU that pays with AMX or on
    AMD's AVX512_BF16; on Intel's without AMX products take twice as long as in float32."""
    recompute: bool = False
    """Keep of each block its input alone and compute the rest anew in the backward: less memory, some third more time.
    With expert parallelism also what experts get and give stays, which would have to be exchanged once more."""
    compile: bool = False
    """Attention and dense feed-forward layers through torch.compile. Routing and experts, whose shapes change with
    every micro-batch, have kernels of their own."""
    lr: PositiveFloat = 6e-4
    min_lr: float = Field(default=3e-5, ge=0)
    warmup_steps: NonNegativeInt = 375
    """Linear warm-up from 0; then a linear decay to min_lr at the last step."""
    weight_decay: float = Field(default=0.1, ge=0)
    """For matrices only; norms and biases do not decay."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: PositiveFloat = 1e-6
    clip_norm: float = Field(default=2.0, gt=0, allow_inf_nan=True)
    """Upper bound of the global gradient norm, over all ranks and experts; .inf: none."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do with a step whose gradient is not finite: stop the run, or go on without its update. More than
    ten skipped in a row stop it too."""
    validate_every: PositiveInt = 100
    checkpoint_every: PositiveInt = 100
    keep_checkpoints: PositiveInt | None = None
    """How many of the newest checkpoints stay, beside the one of the lowest validation loss; by default all do."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} is above lr {self.lr}")
        return self


class TrackingSpec(Section):
    mlflow: str | None = Field(default=None, min_length=1)
    """A tracking server of MLflow, http(s)://host:port, or what else MLflow takes for one (extra `mlflow`). A user name
    or token for it comes from MLflow's own environment variables, never from here."""
    experiment: str = Field(default="mhmoe", min_length=1)
    """Of MLflow, that the run belongs to."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.mlflow and "@" in self.mlflow.partition("://")[2].partition("/")[0]:
            raise ValueError(
                "mlflow holds a user name, which everybody who reads the spec would see: set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD where workers run"
            )
        return self
