"""The interface of an objective: what a micro-batch is to the model, and which losses it has."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from mhmoe_ray.distributed.mesh import Mesh
from mhmoe_ray.model.noise import Noise
from mhmoe_ray.spec import RunSpec

if TYPE_CHECKING:
    from mhmoe_ray.data.shards.manifest import DataManifest

Batch = TypeVar("Batch")
Output = TypeVar("Output")


class LossSums(NamedTuple):
    """Losses of one micro-batch."""

    terms: list[Tensor]
    """Sum over targets of each term of the step's loss, with gradients."""
    part_sums_P2: Tensor
    """Sum and number of targets of each loss in `RunSpec.loss_names`, float64, without gradients."""


class Validation(NamedTuple):
    """Result of a validation."""

    loss: float
    targets: int
    """Number of targets that count, in all held-out samples."""
    part_losses: dict[str, float]
    """Mean of each loss in `RunSpec.loss_names` that has held-out samples; empty for a run without parts."""


class Environment(NamedTuple):
    """Environment in which an objective computes losses on one rank."""

    spec: RunSpec
    mesh: Mesh
    device: torch.device
    run_model: Callable[..., Any]
    """Function that calls the model in the run's precision, with gradients if they are enabled."""
    on_progress: Callable[[], None]
    """Function to call after each micro-batch of a validation."""


class Objective(ABC, Generic[Batch, Output]):
    """Objective of a training on one rank.

    The loss of a step is the sum over terms of a weight times the mean over all targets of the step, on all ranks.
    """

    weights: tuple[float, ...]
    """Weight of each term."""
    rows_per_micro_batch: int
    """Number of rows of a micro-batch in the training stream."""

    def __init__(self, environment: Environment) -> None:
        self.environment = environment
        self.spec, self.mesh, self.device = environment[:3]

    @abstractmethod
    def receive(self, rows: Mapping[str, np.ndarray]) -> tuple[int, Batch]:
        """Return the digest of a micro-batch of the training stream, and the micro-batch on the device of this rank.

        Args:
            rows: columns of the stream.
        """

    @abstractmethod
    def count_targets(self, batches: Iterable[Batch]) -> tuple[Iterable[Batch], list[int], int]:
        """Count the targets of a step over all ranks; this may be a collective operation.

        Args:
            batches: micro-batches of this rank.

        Returns:
            The micro-batches; the number of targets of each term; and the number of tokens of the step.
        """

    @abstractmethod
    def run(self, batch: Batch, noise: Noise | None) -> Output:
        """Return the output of the model for a micro-batch, which has a `routing`."""

    @abstractmethod
    def loss_sums(self, output: Output, batch: Batch) -> LossSums:
        """Return the losses of a micro-batch from the model's output."""

    @abstractmethod
    def step_loss(self, loss: float, targets: int, part_sums_P2: Tensor) -> float:
        """Return the loss of a step from its sums over all ranks.

        Args:
            loss: sum of all terms.
            targets: number of tokens of the step.
            part_sums_P2: sums of `LossSums.part_sums_P2`.
        """

    @property
    def state(self) -> dict[str, Any] | None:
        """State that checkpoints must have besides weights and moments; None if there is none."""
        return None

    def load_state(self, state: Mapping[str, Any] | None) -> None:
        """Continue from the state in a checkpoint."""

    @abstractmethod
    def load_validation(self, manifest: "DataManifest") -> Any:
        """Return the held-out samples that `validate` takes; every rank loads the same.

        Args:
            manifest: manifest of the prepared data.
        """

    @abstractmethod
    def validate(self, samples: Any) -> Validation:
        """Return the losses of held-out samples, which are the same on every rank; this is a collective operation."""
