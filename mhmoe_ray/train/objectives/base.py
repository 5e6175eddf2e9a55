"""The interface of a training objective: how a micro-batch becomes input of the model, and which losses it has.

The trainer calls the model; an objective makes micro-batches and scores the model's outputs.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from mhmoe_ray.distributed.dispatch.exchange import WaitTimer
from mhmoe_ray.distributed.mesh import Mesh
from mhmoe_ray.model.trunk import Trunk
from mhmoe_ray.runs import metrics
from mhmoe_ray.spec import RunSpec

if TYPE_CHECKING:
    from mhmoe_ray.checkpoint.manifest import CheckpointManifest
    from mhmoe_ray.data.shards.manifest import DataManifest
    from mhmoe_ray.runs.directory import RunDir

# Number of bytes of a micro-batch's digest. Ranks exchange digests as float64, which holds every integer of 6 bytes
# exactly.
DIGEST_BYTES = 6


def array_digest(arrays: Iterable[np.ndarray]) -> int:
    """Return an integer digest of the arrays of a micro-batch, with which the samples of runs can be compared."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for array in arrays:
        digest.update(array.tobytes())
    return int.from_bytes(digest.digest(), "little")


Batch = TypeVar("Batch")
Output = TypeVar("Output")


class LossSums(NamedTuple):
    """Losses of one micro-batch, as sums over its targets."""

    terms: list[Tensor]  # summed over the targets of the micro-batch, with gradients
    part_sums_P2: Tensor
    """Sum of each of the P losses in `RunSpec.loss_names`, and its targets, float64, without gradients."""


class Validation(NamedTuple):
    """Losses of a validation on held-out samples."""

    loss: float
    targets: int  # that count, in all held-out samples
    part_losses: dict[str, float]
    """Mean of each loss or figure in `RunSpec.loss_names` that has held-out samples."""


class Environment(NamedTuple):
    """Objects of a rank that an objective needs to compute its losses."""

    spec: RunSpec
    mesh: Mesh
    device: torch.device
    run_model: Callable[[Any], Any]  # model's output for a micro-batch, in the run's precision, without random numbers
    on_progress: Callable[[], None]  # to call after each micro-batch of a validation, for the watchdog
    wait_timer: WaitTimer  # of the waits for other ranks while targets are counted


class Change(Protocol):
    """Named tuple that describes, as a string too, what an objective has adapted; its fields become an event."""

    def _asdict(self) -> dict[str, Any]: ...


class ModelArguments(NamedTuple):
    """Arguments of a call of the model, except `noise`."""

    positional: tuple[Any, ...]
    keywords: dict[str, Any]


class Objective(ABC, Generic[Batch, Output]):
    """Training objective on one rank: it makes the model's input from a micro-batch, computes losses, and validates.

    The loss of a step is a weighted sum of terms. Each term is a mean over all its targets in the step, on all ranks.
    """

    part_metric, val_part_metric = metrics.PART_LOSS, metrics.VAL_PART_LOSS  # of `RunSpec.loss_names`
    weights: tuple[float, ...]  # of each term in the loss of a step
    rows_per_micro_batch: int  # in the Ray Dataset of the training stream

    def __init__(self, environment: Environment, model: Trunk, inputs: Any = None) -> None:
        """Create the objective of this rank; `inputs` is the result of `load_inputs`."""
        self.environment = environment
        self.spec, self.mesh, self.device = environment[:3]

    @staticmethod
    def load_inputs(run: "RunDir", spec: RunSpec, manifest: "DataManifest") -> Any:
        """Return what the objective needs from files of the run and of its prepared data."""
        return None

    def prepare(
        self, run: "RunDir", manifest: "DataManifest", start: "CheckpointManifest | None", fence: Callable[[], object]
    ) -> None:
        """Compute or read what the objective needs of the restored model, in a collective operation before validation.

        Args:
            run: directory of the run.
            manifest: data manifest of the prepared data.
            start: manifest of the restored checkpoint.
            fence: raises an error if the run has a newer attempt, before a file is written.
        """

    def extra_ends(self, manifest: "DataManifest") -> set[int]:
        """Return the tokens that end a text in addition to those of the tokenizer."""
        return set()

    @abstractmethod
    def receive(self, rows: Mapping[str, np.ndarray]) -> tuple[int, Batch]:
        """Return the digest of a micro-batch and the micro-batch on this rank's device; `rows` are the stream's
        columns."""

    @abstractmethod
    def count_targets(self, batches: Iterable[Batch]) -> tuple[Iterable[Batch], list[int], int]:
        """Count the targets of a step over all ranks; this may be a collective operation.

        Returns:
            The micro-batches; the number of targets of each term of the loss; and the number of tokens of the step.
        """

    @abstractmethod
    def model_arguments(self, batch: Batch) -> ModelArguments:
        """Return the arguments of the model for a micro-batch; its output's `routing` has the routing of each layer."""

    @abstractmethod
    def loss_sums(self, output: Output, batch: Batch) -> LossSums:
        """Return the losses of a micro-batch from the model's output."""

    @abstractmethod
    def step_loss(self, loss: float, targets: int, part_sums_P2: Tensor) -> float:
        """Return the loss of a step, computed from sums over all ranks and micro-batches.

        Args:
            loss: sum of all terms of the loss.
            targets: number of tokens of the step.
            part_sums_P2: sum of `LossSums.part_sums_P2`.
        """

    def adapt(self, samples: Any, step: int) -> Sequence[Change]:
        """Adapt the model after `step` steps by held-out samples, as the spec asks, and return the changes. This is a
        collective operation."""
        return []

    @property
    def metrics(self) -> dict[str, Any]:
        """Metrics of the present state, beside those of steps."""
        return {}

    @property
    def state(self) -> dict[str, Any] | None:
        """State of the objective that checkpoints save besides weights and moments; None if it has no state."""
        return None

    def load_state(self, state: Mapping[str, Any] | None) -> None:
        """Restore the state of the objective from a checkpoint; None means that the checkpoint has none."""

    @abstractmethod
    def load_validation(self, manifest: "DataManifest") -> Any:
        """Return the held-out samples that `validate` takes; every rank loads the same."""

    @abstractmethod
    def validate(self, samples: Any) -> Validation:
        """Return the losses of held-out samples in a collective operation; samples and losses are the same on every
        rank."""


def objective_class(spec: RunSpec) -> type[Objective[Any, Any]]:
    """Return the class of a run's objective: that of its data, or else that of its model's family."""
    names = [part.traits.implementation for part in spec.parts if part.traits.implementation]
    objective: type[Objective[Any, Any]] = resolve_name(names[0]) if names else spec.model.family.part("objective")
    return objective
