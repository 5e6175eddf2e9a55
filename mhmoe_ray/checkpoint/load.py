"""Load a checkpoint: its tensors at any world size, a trainer's state, or a model.

Each rank of the run that saved a checkpoint wrote one file with its slices of tensors. A reader takes the slices that
it needs from all files, and does not wait for other ranks.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from mhmoe_ray.checkpoint.format import (
    SUFFIX,
    SliceIndex,
    StoredSlice,
    full_shape,
    local_slice,
    read_into,
    stored_slices,
)
from mhmoe_ray.checkpoint.manifest import CheckpointManifest, read_manifest, removed_error, stored_manifest
from mhmoe_ray.errors import CheckpointError
from mhmoe_ray.model.adapter import MatrixSum, add_adapters, matrix_sums
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.model.trunk import Trunk
from mhmoe_ray.spec import ModelSpec, RunSpec
from mhmoe_ray.storage import Location, is_special

M = TypeVar("M", bound=Trunk)

# Serving imports this module and needs no distributed tensors, so these imports are for type checkers only.
if TYPE_CHECKING:
    from mhmoe_ray.distributed.mesh import Mesh
    from mhmoe_ray.distributed.strategies.ddp import Strategy


def load_tensors(
    folder: Location,
    tensors: Mapping[str, Tensor],
    on_slice: Callable[[], None] = lambda: None,
    index: SliceIndex | None = None,
) -> None:
    """Fill tensors in place with the values that folder `weights` or `optim` stores, converted to the tensors' dtypes.

    Of a DTensor, only this rank's shard is filled. `index` saves a second `read_index`. A missing tensor, a missing
    part, a wrong shape or a checkpoint that is removed meanwhile is a CheckpointError.
    """
    index = read_index(folder) if index is None else index
    targets = {name: local_slice(tensor) for name, tensor in tensors.items()}
    slices_by_file: dict[Location, list[tuple[str, StoredSlice]]] = {}
    for name, target in targets.items():
        tensor_slices = index.get(name, [])
        if not tensor_slices:
            raise _mismatch_error(folder, f"{name} is not in it")
        if (shape := full_shape(tensor_slices)) != (target.shape or (1,)):
            raise _mismatch_error(folder, f"{name} has shape {shape} there and {target.shape} in the model")
        for stored in tensor_slices:
            slices_by_file.setdefault(stored.file, []).append((name, stored))
    filled = dict.fromkeys(targets, 0)
    # Only one file at a time is open, because a checkpoint of many ranks may have more files than a process may open.
    for path, file_slices in slices_by_file.items():
        with _report_removal(folder), path.open("rb", buffering=0) as file:
            for name, stored in file_slices:
                filled[name] += read_into(targets[name], stored, file)
                on_slice()
    for name, target in targets.items():
        if filled[name] < target.local.numel():
            raise _mismatch_error(folder, f"a part of {name} is not in it")


def read_tensors(
    folder: Location, shapes: Mapping[str, Sequence[int]], index: SliceIndex | None = None
) -> dict[str, Tensor]:
    """Read tensors of these shapes like `load_tensors`, in the dtypes in which they are stored."""
    index = read_index(folder) if index is None else index
    tensors = empty_tensors(shapes, index)
    load_tensors(folder, tensors, index=index)
    return tensors


def empty_tensors(shapes: Mapping[str, Sequence[int]], index: SliceIndex) -> dict[str, Tensor]:
    """Return uninitialized tensors in the dtypes in which they are stored."""
    # A missing tensor has no dtype here; `load_tensors` raises the error for it.
    dtypes = {name: index[name][0].dtype if name in index else None for name in shapes}
    return {name: torch.empty(shape, dtype=dtypes[name]) for name, shape in shapes.items()}


def read_index(folder: Location) -> SliceIndex:
    """Return the slices in all safetensors files of a folder by tensor name, from their headers.

    A damaged file, or a checkpoint that is removed meanwhile, is a CheckpointError.
    """
    index: dict[str, list[StoredSlice]] = {}
    with _report_removal(folder):
        files: list[Location] = list(folder.glob(f"*{SUFFIX}"))
        for file in sorted(files, key=lambda file: file.name):
            try:
                if is_special(file):
                    raise ValueError("it is no regular file")
                slices = stored_slices(file)
            except (ValueError, KeyError) as e:
                reason = f"{file.name} cannot be read ({e})"
                raise CheckpointError(f"checkpoint {folder.parent}", reason, "use another checkpoint of the run") from e
            for name, stored in slices.items():
                index.setdefault(name, []).append(stored)
    return index


@contextmanager
def _report_removal(folder: Location) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as e:
        # Retention may delete a checkpoint while another process reads it.
        raise removed_error(folder.parent) from e


def _mismatch_error(folder: Location, reason: str) -> CheckpointError:
    return CheckpointError(f"checkpoint {folder.parent}", reason, "use the model section that it was written with")


class WeightsReader:
    """Reader of the weights of a checkpoint. Those of a checkpoint with an adapter are sums of base and adapter."""

    def __init__(self, checkpoint: Location) -> None:
        """Read the headers of a checkpoint that `read_manifest` has verified."""
        manifest = stored_manifest(checkpoint)
        self._folder = self._adapter_folder = checkpoint / "weights"
        self._sums: dict[str, list[MatrixSum]] = {}
        if manifest.adapter is not None:
            self._folder = checkpoint.with_name(manifest.adapter.base) / "weights"
            with torch.device("meta"):
                model = Decoder(manifest.model)
                add_adapters(model, manifest.adapter.spec)
            for name, matrix_sum in matrix_sums(model):
                self._sums.setdefault(name, []).append(matrix_sum)
            self._adapter_index = read_index(self._adapter_folder)
            self._shapes = {name: p.shape for name, p in model.trained_parameters().items()}
        self.index = read_index(self._folder)
        """Stored slices of the weights without an adapter."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill full tensors like `load_tensors`."""
        load_tensors(self._folder, tensors, index=self.index)
        for name, tensor in tensors.items():
            for matrix_sum in self._sums.get(name, ()):
                matrix_sum.add_to(tensor, *(t.to(tensor.device) for t in self._adapter_tensors(matrix_sum)))

    def adapters(self) -> Iterator[tuple[str, MatrixSum, Tensor, Tensor]]:
        """Yield the name of each matrix with an adapter, or of a part of it, with the adapter and its A and B."""
        for name, sums in self._sums.items():
            for matrix_sum in sums:
                yield name, matrix_sum, *self._adapter_tensors(matrix_sum)

    def _adapter_tensors(self, matrix_sum: MatrixSum) -> tuple[Tensor, Tensor]:
        shapes = {name: self._shapes[name] for name in (matrix_sum.a_name, matrix_sum.b_name)}
        tensors = read_tensors(self._adapter_folder, shapes, self._adapter_index)
        return tensors[matrix_sum.a_name], tensors[matrix_sum.b_name]

    def read(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """Read full tensors like `read_tensors`."""
        tensors = empty_tensors(shapes, self.index)
        self.load(tensors)
        return tensors


def equal_weights(checkpoint: Location, other_checkpoint: Location) -> bool:
    """Return whether two checkpoints, neither with an adapter, have equal weights, however ranks divided them."""
    readers = [WeightsReader(path) for path in (checkpoint, other_checkpoint)]
    shapes = [{name: full_shape(slices) for name, slices in reader.index.items()} for reader in readers]
    if shapes[0] != shapes[1]:
        return False
    # One tensor at a time, because the weights may not fit into memory.
    for name, shape in shapes[0].items():
        tensors = [reader.read({name: shape})[name] for reader in readers]
        if not torch.equal(*tensors):
            return False
    return True


class StatefulObjective(Protocol):
    """Interface of a training objective (`train.objectives.Objective`) whose state is saved in checkpoints."""

    @property
    def state(self) -> dict[str, Any] | None:
        """State that a checkpoint must hold in addition to weights and moments; None if the objective has none."""

    def load_state(self, state: Mapping[str, Any] | None) -> None:
        """Restore the state of a checkpoint; `state` is None if the checkpoint holds none."""


class TrainerState(Protocol):
    """Interface through which checkpoints access a trainer (`train.step.Trainer`)."""

    spec: RunSpec
    mesh: "Mesh"
    device: torch.device
    strategy: "Strategy"
    step: int
    tokens: int
    skipped: int
    skipped_in_a_row: int
    recent_updates: list[list[float]]
    updates_before: int
    before_update: Callable[[], None]
    """Callback before each optimizer update, which changes the state; it can wait until the state is copied."""
    on_progress: Callable[[], None]

    @property
    def objective(self) -> StatefulObjective: ...


def restore(trainer: TrainerState, checkpoint: Location, manifest: CheckpointManifest) -> None:
    """Restore a trainer from a checkpoint, which may come from another world size or sharding strategy.

    This is a collective operation that verifies no files. The checkpoint of step 0 of a run that starts from another
    model may have no moments; the moments and the buffers that only training needs are then zero.
    """
    strategy = trainer.strategy
    # AdamW counts updates, which may be fewer than steps, because a skipped step makes no update.
    strategy.start_at_step(manifest.updates)
    weights, moments = strategy.checkpoint_weights(), strategy.checkpoint_moments()
    if trainer.spec.train.adapter:
        base = checkpoint.with_name(manifest.adapter.base) if manifest.adapter else checkpoint
        load_tensors(base / "weights", strategy.frozen_weights(), trainer.on_progress)
    averages = strategy.checkpoint_averages() if manifest.is_averaged else {}
    # An adapter begins with its initial values.
    if manifest.adapter or not trainer.spec.train.adapter:
        load_tensors(checkpoint / "weights", {**weights, **averages}, trainer.on_progress)
    if manifest.has_moments:
        state = {**moments, **strategy.model.training_buffers()}
        if averages:
            state |= strategy.checkpoint_trained_weights()
        load_tensors(checkpoint / "optim", state, trainer.on_progress)
    if strategy.average and not averages:
        strategy.average.restart()
    strategy.finish_loading(weights, moments)
    trainer.objective.load_state(manifest.objective)
    trainer.updates_before = manifest.updates_before
    trainer.step, trainer.tokens = manifest.step, manifest.tokens
    trainer.skipped, trainer.skipped_in_a_row = manifest.skipped, manifest.skipped_in_a_row
    trainer.recent_updates = manifest.recent_updates


def load_model(checkpoint: Location) -> tuple[Decoder, CheckpointManifest]:
    """Verify the weights of a checkpoint and load its decoder for inference on one device: float32, with all experts.

    An uncommitted, incomplete or damaged checkpoint, or another model than a decoder, is a CheckpointError.
    """
    manifest = read_manifest(checkpoint, parts=("weights",))
    if not manifest.model.family.predicts_next_token:
        reason = f"its model is {manifest.model.family.title}, which does not predict next tokens"
        raise CheckpointError(f"checkpoint {checkpoint}", reason, "evaluate it with `mhmoe eval`, or name another run")
    return load_verified_model(checkpoint, manifest), manifest


def load_verified_model(checkpoint: Location, manifest: CheckpointManifest) -> Decoder:
    """Load the decoder of a checkpoint whose files `read_manifest` has verified, for inference."""
    return load_for_inference(Decoder(manifest.model), checkpoint)


def inference_decoder(spec: ModelSpec) -> Decoder:
    """Return a decoder with all experts and uninitialized weights, in evaluation mode, float32, without gradients."""
    return _for_inference(Decoder(spec))


def load_for_inference(model: M, checkpoint: Location) -> M:
    """Load a checkpoint that `read_manifest` has verified into an uninitialized model, ready for inference."""
    WeightsReader(checkpoint).load(_for_inference(model).named_tensors())
    return model


def _for_inference(model: M) -> M:
    model.requires_grad_(False).eval()
    for layer in model.moe_layers():
        # The kernel that training used may need a device or a package that this machine lacks.
        layer.experts.kernel = "auto"
    return model
