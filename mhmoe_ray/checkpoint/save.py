"""Checkpoint writer in the background: training waits neither for storage nor, usually, for the copy of its state.

    training    | step 100 | forward and backward of 101 | update | step 102 | step 103 | ...
    background              | copy the state | write and hash the rank's own files  | gather hashes | commit manifest |

The state of training changes only in optimizer updates, so it is copied during the forward and backward pass of the
next step. The update waits until the copy is complete. Each rank copies only its own share (`WriterAssignment`) into
buffers, which later checkpoints reuse, and writes it. Checkpoints have a process group of their own, because training
may be using the default one. One checkpoint at a time is written, and the next one waits for it.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from threading import Event, Thread
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mhmoe_ray.checkpoint.format import Slice, file_name, local_slice, write_slices
from mhmoe_ray.checkpoint.load import TrainerState
from mhmoe_ray.checkpoint.manifest import (
    PARTS,
    AdapterRecord,
    CheckpointManifest,
    checkpoint_name,
    commit,
    stored_manifest,
)
from mhmoe_ray.checkpoint.retention import RetentionPolicy, delete_checkpoint
from mhmoe_ray.data.shards.manifest import data_digest
from mhmoe_ray.errors import CheckpointError, StorageError
from mhmoe_ray.model.held import is_dtensor
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.storage import FileEntry, Location, create_file, describe_file, sync, write_json


class WriterAssignment:
    """Assignment of each slice of a tensor to its writer: the least loaded of the ranks that hold the slice.

    Every rank computes the same assignment without communication, if all ask for the same tensors in the same order.
    """

    def __init__(self) -> None:
        world, self._rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        self._assigned_elements = [0] * world

    def is_writer(self, tensor: Tensor) -> bool:
        """Assign a writer to each slice of a tensor, and return whether this rank writes the slice that it holds.

        Each shard of a DTensor is a slice; any other tensor is a single slice that all ranks hold.
        """
        rank_groups = self._holders(tensor)
        slice_elements = tensor.numel() // len(rank_groups)
        return self._rank in [self._assign_writer(holders, slice_elements) for holders in rank_groups]

    def _assign_writer(self, holders: list[int], elements: int) -> int:
        writer = min(holders, key=self._assigned_elements.__getitem__)
        self._assigned_elements[writer] += elements
        return writer

    def _holders(self, tensor: Tensor) -> list[list[int]]:
        """Return the ranks that hold a slice, one list for each slice of a tensor."""
        if not is_dtensor(tensor):
            return [list(range(len(self._assigned_elements)))]
        from torch.distributed.tensor import Replicate

        mesh = tensor.device_mesh.mesh
        replicated_dims = [dim for dim, placement in enumerate(tensor.placements) if isinstance(placement, Replicate)]
        sharded_dims = [dim for dim in range(mesh.ndim) if dim not in replicated_dims]
        rank_groups = mesh.permute(*sharded_dims, *replicated_dims).reshape(
            -1, *(mesh.shape[dim] for dim in replicated_dims)
        )
        return [holders.flatten().tolist() for holders in rank_groups]


def save_slices(
    folder: Location, slices: Mapping[str, Slice], rank: int, on_piece: Callable[[], None] = lambda: None
) -> FileEntry:
    """Write a rank's slices to its new file in a folder of a checkpoint; without slices the file has no data.

    An existing file is an OSError, like any failure to write.
    """
    with create_file(folder / file_name(rank)) as file:
        return write_slices(file, slices, on_piece)


T = TypeVar("T")
_create_stream: Callable[[torch.device], torch.cuda.Stream] = torch.cuda.Stream
_FIX = "make room or repair the storage, then `mhmoe resume`; the previous checkpoint is intact"


class _SliceCopy(NamedTuple):
    """Copy of one slice of a tensor in CPU memory, which this rank makes and then writes."""

    part: str
    name: str
    source: torch.Tensor | None
    """Tensor to copy; None if the copy is done."""
    slice: Slice
    """Slice whose values are the copy."""


class Saver:
    """Checkpoint writer of one rank, which writes in a background thread while training continues.

    All ranks call the same methods in the same order.
    """

    def __init__(
        self,
        run: RunDir,
        trainer: TrainerState,
        group: int,
        on_piece: Callable[[], None] = lambda: None,
        ends: Iterable[int] = (),
        adds_start: bool = True,
        before_commit: Callable[[], None] = lambda: None,
        after_commit: Callable[[Location], None] = lambda _: None,
    ) -> None:
        """Prepare to save a trainer, whose optimizer updates wait for a copy in progress from now on.

        This is a collective operation, because it creates a process group. `group` is the number of this worker group,
        which makes checkpoint names unique. The background thread calls `on_piece` after each piece of a file. `ends`
        are token ids that end a text besides the tokenizer's, and `adds_start` says that a start token precedes each.
        Rank 0 calls `before_commit` before it commits a checkpoint, which an error prevents, and then `after_commit`.
        """
        self._ends, self._adds_start = sorted(ends), adds_start
        self._before_commit, self._after_commit = before_commit, after_commit
        self._run, self._trainer, self._group, self._on_piece = run, trainer, group, on_piece
        newest_count = trainer.spec.train.keep_checkpoints
        trainer.before_update = self._wait_for_copy
        # Ranks may write for a long time. The watchdog, not this timeout, ends a rank that hangs.
        timeout = timedelta(days=1)
        self._process_group = dist.new_group(backend="gloo", timeout=timeout) if trainer.mesh.world_size > 1 else None
        self._buffers: dict[tuple[str, str], torch.Tensor] = {}
        self._copy_stream = _create_stream(trainer.device) if trainer.device.type == "cuda" else None
        self._copy_done = Event()
        self._pause_seconds = 0.0
        self._data_sha256 = data_digest(trainer.spec.data.prepared)
        has_tokenizer = trainer.spec.model.family.has_tokenizer
        self._tokenizer_sha256 = describe_file(run.tokenizer_file).sha256 if has_tokenizer else None
        has_classes = trainer.spec.model.has_classes
        self._classes_sha256 = describe_file(run.classes_file).sha256 if has_classes else None
        self._adapter: AdapterRecord | None = None
        if trainer.spec.train.adapter:
            base = run.checkpoints / checkpoint_name(0, 0)
            base_sha256 = stored_manifest(base).weights_sha256
            self._adapter = AdapterRecord(spec=trainer.spec.train.adapter, base=base.name, base_sha256=base_sha256)
        self._retention: RetentionPolicy | None = None
        if newest_count and trainer.mesh.rank == 0:
            self._retention = RetentionPolicy(run, newest_count, self._adapter.base if self._adapter else None)
        self._thread: Thread | None = None
        self._error: Exception | None = None

    def save(self, count_LE: torch.Tensor, val_loss: float | None = None) -> None:
        """Start to write a checkpoint in the background; a failure of the previous one is a CheckpointError.

        Rank 0 writes `count_LE`, the routes per layer and expert since the previous checkpoint, to the run's folder
        `routing`. `val_loss` is for retention; None if this step had no validation.
        """
        # The measured pause of training includes this wait for the previous checkpoint and, later, the wait for the
        # copy.
        start_time = time.monotonic()
        self.wait()
        self._copy_done.clear()
        copies, manifest = self._prepare_copies(), self._manifest()
        counts = {"step": manifest.step, "routes_per_layer_and_expert": count_LE.tolist()}
        # On a GPU, the copy must wait for the kernels that are queued now, because they compute the state.
        state_ready = torch.cuda.current_stream().record_event() if self._copy_stream else None
        write_args = (copies, state_ready, manifest, counts, val_loss)
        self._thread = Thread(target=self._write_checkpoint, args=write_args, name="saver", daemon=True)
        self._thread.start()
        self._pause_seconds = time.monotonic() - start_time

    def _wait_for_copy(self) -> None:
        if self._thread and not self._copy_done.is_set():
            start_time = time.monotonic()
            self._copy_done.wait()
            self._pause_seconds += time.monotonic() - start_time

    def wait(self) -> None:
        """Wait until the started checkpoint is committed; CheckpointError if any rank could not write its files."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._error:
            raise self._error

    @property
    def has_failed(self) -> bool:
        """True if `wait` would raise an error.

        Ranks learn of a failure at different moments, so they must agree on it before they call `wait`.
        """
        return self._error is not None

    def _prepare_copies(self) -> list[_SliceCopy]:
        """Return the slices that this rank writes, with buffers for their copies; gathered tensors are copied here."""
        copies, assignment, strategy = list[_SliceCopy](), WriterAssignment(), self._trainer.strategy
        for part, name, tensor in strategy.checkpoint_tensors():
            if not assignment.is_writer(tensor):
                continue
            source = local_slice(tensor)
            buffer = self._buffers.get((part, name))
            if buffer is None:
                # A copy from a GPU is asynchronous only if its target is pinned.
                is_pinned = source.local.device.type == "cuda"
                buffer = torch.empty(source.local.shape, dtype=source.local.dtype, pin_memory=is_pinned)
                self._buffers[part, name] = buffer
            copy = _SliceCopy(part, name, source.local, source._replace(local=buffer))
            # A gathered tensor is temporary; all others are views of the state and can be copied later.
            if strategy.gathers_state:
                buffer.copy_(source.local)
                copy = copy._replace(source=None)
            copies.append(copy)
        return copies

    def _copy_state(self, copies: list[_SliceCopy], state_ready: torch.cuda.Event | None) -> None:
        if self._copy_stream:
            # The default device of a new thread is the first GPU. Without this call, the thread would use memory of
            # that GPU.
            torch.cuda.set_device(self._copy_stream.device)
        with torch.cuda.stream(self._copy_stream):
            if self._copy_stream and state_ready:
                self._copy_stream.wait_event(state_ready)
            for copy in copies:
                buffer = copy.slice.local
                if copy.source is None:
                    continue
                if copy.source.device.type == "cpu" and copy.source.is_contiguous():
                    # numpy copies in this thread alone. torch would use as many threads as training and slow it down.
                    target, source = (t.view(-1).view(torch.uint8).numpy() for t in (buffer, copy.source))
                    np.copyto(target, source)
                else:
                    buffer.copy_(copy.source, non_blocking=True)
            if self._copy_stream:
                self._copy_stream.synchronize()

    def _manifest(self) -> CheckpointManifest:
        trainer, spec = self._trainer, self._trainer.spec
        return CheckpointManifest(
            step=trainer.step,
            skipped=trainer.skipped,
            skipped_in_a_row=trainer.skipped_in_a_row,
            recent_updates=trainer.recent_updates,
            updates_before=trainer.updates_before,
            tokens=trainer.tokens,
            position=trainer.step * spec.samples_per_step,
            seed=spec.seed,
            world=trainer.mesh.world_size,
            ep=trainer.mesh.ep,
            model=spec.model,
            adapter=self._adapter,
            is_averaged=trainer.strategy.average is not None,
            seq_len=spec.data.seq_len,
            ends=self._ends,
            adds_start=self._adds_start,
            data_sha256=self._data_sha256,
            tokenizer_sha256=self._tokenizer_sha256,
            classes_sha256=self._classes_sha256,
            objective=trainer.objective.state,
            files={},
        )

    def _write_checkpoint(
        self,
        copies: list[_SliceCopy],
        state_ready: torch.cuda.Event | None,
        manifest: CheckpointManifest,
        counts: dict[str, Any],
        val_loss: float | None,
    ) -> None:
        """Write this rank's files; rank 0 also commits the checkpoint and deletes old ones. `wait` raises an error."""
        start_time = time.monotonic()
        checkpoint = self._run.checkpoints / checkpoint_name(manifest.step, self._group)
        rank = self._trainer.mesh.rank

        def write_files() -> dict[str, FileEntry]:
            try:
                self._copy_state(copies, state_ready)
            finally:
                # This is set even after an error, because otherwise the next update would wait forever.
                self._copy_done.set()
            entries = {}
            for part in PARTS:
                slices = {copy.name: copy.slice for copy in copies if copy.part == part}
                entries[f"{part}/{file_name(rank)}"] = save_slices(checkpoint / part, slices, rank, self._on_piece)
            return entries

        def commit_checkpoint() -> None:
            if rank == 0:
                files = {name: entry for rank_entries in entries_by_rank for name, entry in rank_entries.items()}
                self._before_commit()
                write_json(self._run.routing / f"{checkpoint.name}.json", counts)
                # Training does not repeat the steps before the checkpoint, so their metrics must not be lost.
                if self._run.metrics_file.exists():
                    sync(self._run.metrics_file)
                # All ranks have written their files, so the manifest may commit them.
                commit(checkpoint, manifest.model_copy(update={"files": files}))
                durations = {"pause": self._pause_seconds, "seconds": time.monotonic() - start_time}
                events.record(self._run, "checkpoint", step=manifest.step, name=checkpoint.name, **durations)
                self._after_commit(checkpoint)
                self._apply_retention(manifest.step, val_loss)

        try:
            entries_by_rank = self._run_on_all_ranks(write_files, checkpoint)
            self._run_on_all_ranks(commit_checkpoint, checkpoint)
        except Exception as e:
            self._error = e

    def _run_on_all_ranks(self, action: Callable[[], T], checkpoint: Location) -> list[T]:
        """Run an action on all ranks together, and return all results; a failure on one is a CheckpointError on all."""
        failure = None
        outcome: tuple[T | None, str | None] = (None, None)
        try:
            outcome = (action(), None)
        except Exception as e:
            failure = e
            outcome = (None, (isinstance(e, OSError) and e.strerror) or f"{type(e).__name__}: {e}")
        outcomes = [outcome]
        if self._process_group:
            outcomes = [outcome] * self._trainer.mesh.world_size
            dist.all_gather_object(outcomes, outcome, group=self._process_group)
        # If one rank failed, all raise: a rank that goes on alone would wait for the others forever.
        for rank, (_, reason) in enumerate(outcomes):
            if reason:
                raise CheckpointError(
                    f"checkpoint {checkpoint}", f"rank {rank} cannot write it: {reason}", _FIX
                ) from failure
        return cast("list[T]", [result for result, _ in outcomes])

    def _apply_retention(self, step: int, val_loss: float | None) -> None:
        # The new checkpoint is committed already. So if old checkpoints cannot be deleted, training must not end, and
        # saving must not count as failed.
        try:
            removable_checkpoints = self._retention.removable_checkpoints(step, val_loss) if self._retention else []
        except (OSError, StorageError) as e:
            print(
                f"warning: old checkpoints of {self._run.path} are kept, because the run directory cannot be read: {e}"
            )
            return
        for checkpoint in removable_checkpoints:
            try:
                delete_checkpoint(checkpoint)
                events.record(self._run, "dropped_checkpoint", name=checkpoint.name)
            except (OSError, StorageError) as e:
                print(f"warning: {checkpoint} cannot be removed: {e}")
