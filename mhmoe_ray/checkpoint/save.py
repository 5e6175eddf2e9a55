"""Checkpoints written while training goes on: it waits neither for storage nor, as a rule, for the copy in memory.

    training    | step 100 | forward and backward of 101 | update | step 102 | step 103 | ...
    background              | copy the state | write own file of each part, hash it | tell others | manifest = commit |

The state changes only in updates, so it is copied beside the next step's forward and backward. Training waits only for
the part of the copy that is left when the update is due. Each rank copies and writes its own share only (`Shares`),
into buffers that are kept. Ranks communicate in a process group of their own, since training's may be in use. One
checkpoint at a time is written: the next one waits for it.
"""

import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from threading import Event, Thread
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mhmoe_ray.checkpoint.format import Slice, file_name, slice_of, write_slices
from mhmoe_ray.checkpoint.load import TrainerState
from mhmoe_ray.checkpoint.manifest import PARTS, Manifest, checkpoint_name, commit
from mhmoe_ray.checkpoint.retention import Retention, drop
from mhmoe_ray.data.shards.manifest import data_digest
from mhmoe_ray.errors import CheckpointError, StorageError
from mhmoe_ray.model.held import is_shared_out
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.storage import FileEntry, Location, create_file, describe_file, write_json


class Shares:
    """Assigns each tensor or slice to one of the ranks that hold it, which writes it: the one with the least to write
    so far.

    Every rank finds the same answer by itself, if all ask for the same tensors in the same order.
    """

    def __init__(self) -> None:
        world, self._rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        self._load = [0] * world

    def is_mine(self, tensor: Tensor) -> bool:
        """Return whether this rank writes its part of a DTensor, or the whole of any other tensor."""
        ours = [self._writer(holders, tensor.numel()) for holders in self._holders(tensor)]
        return self._rank in ours

    def _writer(self, holders: list[int], size: int) -> int:
        least = min(holders, key=self._load.__getitem__)
        self._load[least] += size
        return least

    def _holders(self, tensor: Tensor) -> list[list[int]]:
        """Return, for each slice of a tensor, the ranks that hold it."""
        if not is_shared_out(tensor):
            return [list(range(len(self._load)))]
        from torch.distributed.tensor import Replicate

        mesh = tensor.device_mesh.mesh
        alike = [dim for dim, placement in enumerate(tensor.placements) if isinstance(placement, Replicate)]
        apart = [dim for dim in range(mesh.ndim) if dim not in alike]
        slices = mesh.permute(*apart, *alike).reshape(-1, *(mesh.shape[dim] for dim in alike))
        return [holders.flatten().tolist() for holders in slices]


def save_slices(
    folder: Location, slices: Mapping[str, Slice], rank: int, on_piece: Callable[[], None] = lambda: None
) -> FileEntry:
    """Write slices that are in CPU memory as one file, which has no bytes of data if there are no slices.

    Args:
        folder: folder of a part of a checkpoint.
        slices: slices by the names of their tensors.
        rank: rank that writes the file.
        on_piece: called after each piece that is written.

    Returns:
        Size and hash of the file.

    Raises:
        OSError: the file exists already, or cannot be written.
    """
    with create_file(folder / file_name(rank)) as file:
        return write_slices(file, slices, on_piece)


T = TypeVar("T")
_stream_of: Callable[[torch.device], torch.cuda.Stream] = torch.cuda.Stream
_FIX = "make room or mend the storage, then `mhmoe resume`: the checkpoint before it is whole"


class _Copy(NamedTuple):
    part: str
    name: str
    source: torch.Tensor | None
    """Tensor to copy; None where the copy is done."""
    slice: Slice
    """Slice whose `local` is the copy."""


class Saver:
    """Checkpoint writer of one rank.

    All ranks call the same methods in the same order.
    """

    def __init__(
        self, run: RunDir, trainer: TrainerState, group: int, on_piece: Callable[[], None] = lambda: None
    ) -> None:
        """Prepare to save the state of a trainer, which from now on waits for the copy before it updates.

        This is a collective operation, because it creates a process group.

        Args:
            run: the run that the checkpoints belong to.
            trainer: trainer whose state is saved.
            group: number of this worker group, for the checkpoints' names: no other worker group writes to the same
                names.
            on_piece: called in the background after each piece that is written.
        """
        self._run, self._trainer, self._group, self._on_piece = run, trainer, group, on_piece
        keep = trainer.spec.train.keep_checkpoints
        self._retention = Retention(run, keep) if keep and trainer.mesh.rank == 0 else None
        trainer.before_update = self._until_copied
        # However long the others take to write: whoever hangs is the watchdog's concern.
        patience = timedelta(days=1)
        self._peers = dist.new_group(backend="gloo", timeout=patience) if trainer.mesh.world > 1 else None
        self._buffers: dict[tuple[str, str], torch.Tensor] = {}
        self._stream = _stream_of(trainer.device) if trainer.device.type == "cuda" else None
        self._copied = Event()
        self._pause = 0.0
        self._data = data_digest(trainer.spec.data.prepared)
        self._tokenizer = describe_file(run.tokenizer_file).sha256
        self._thread: Thread | None = None
        self._error: Exception | None = None

    def save(self, count_LE: torch.Tensor, val_loss: float | None = None) -> None:
        """Begin to write the state, which the trainer will not change before it is copied.

        Args:
            count_LE: routes per layer and expert since the previous checkpoint, which rank 0 writes below `routing/`.
            val_loss: validation loss of this step, None if it was not validated.

        Raises:
            CheckpointError: the previous checkpoint could not be written.
        """
        began = time.monotonic()
        self.wait()
        self._copied.clear()
        share, manifest = self._share(), self._manifest()
        counts = {"step": manifest.step, "routes_per_layer_and_expert": count_LE.tolist()}
        ready = torch.cuda.current_stream().record_event() if self._stream else None
        args = (share, ready, manifest, counts, val_loss)
        self._thread = Thread(target=self._write, args=args, name="saver", daemon=True)
        self._thread.start()
        self._pause = time.monotonic() - began

    def _until_copied(self) -> None:
        if self._thread and not self._copied.is_set():
            began = time.monotonic()
            self._copied.wait()
            self._pause += time.monotonic() - began

    def wait(self) -> None:
        """Wait until no checkpoint is being written.

        Raises:
            CheckpointError: a checkpoint could not be written, by any rank.
        """
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._error:
            raise self._error

    @property
    def failed(self) -> bool:
        """Whether `wait` would raise.

        Ranks learn of a failure at different moments: agree before acting on it.
        """
        return self._error is not None

    def _share(self) -> list[_Copy]:
        """Return what this rank writes, not copied yet unless the strategy gathered it for this purpose."""
        share, shares, strategy = list[_Copy](), Shares(), self._trainer.strategy
        for part, name, tensor in strategy.state():
            if not shares.is_mine(tensor):
                continue
            source = slice_of(tensor)
            into = self._buffers.get((part, name))
            if into is None:
                pinned = source.local.device.type == "cuda"  # else a copy from there would not be asynchronous
                into = torch.empty(source.local.shape, dtype=source.local.dtype, pin_memory=pinned)
                self._buffers[part, name] = into
            copy = _Copy(part, name, source.local, source._replace(local=into))
            if strategy.gathers:
                into.copy_(source.local)
                copy = copy._replace(source=None)
            share.append(copy)
        return share

    def _copy(self, share: list[_Copy], ready: torch.cuda.Event | None) -> None:
        """Copy the share of this rank, in the background; on a GPU, on a stream beside that of its work."""
        if self._stream:
            torch.cuda.set_device(self._stream.device)  # of this thread, which else would take memory of the first GPU
        with torch.cuda.stream(self._stream):
            if self._stream and ready:
                self._stream.wait_event(ready)
            for copy in share:
                into = copy.slice.local
                if copy.source is None:
                    continue
                if copy.source.device.type == "cpu" and copy.source.is_contiguous():
                    # By this thread alone: torch would take as many threads as training has, and be in its way.
                    target, source = (t.view(-1).view(torch.uint8).numpy() for t in (into, copy.source))
                    np.copyto(target, source)
                else:
                    into.copy_(copy.source, non_blocking=True)
            if self._stream:
                self._stream.synchronize()

    def _manifest(self) -> Manifest:
        """Return the manifest of the present state, without its files."""
        trainer, spec = self._trainer, self._trainer.spec
        return Manifest(
            step=trainer.step,
            skipped=trainer.skipped,
            skipped_in_a_row=trainer.skipped_in_a_row,
            tokens=trainer.tokens,
            position=trainer.step * spec.samples_per_step,
            seed=spec.seed,
            world=trainer.mesh.world,
            ep=trainer.mesh.size("ep"),
            model=spec.model,
            seq_len=spec.data.seq_len,
            data_sha256=self._data,
            tokenizer_sha256=self._tokenizer,
            files={},
        )

    def _write(
        self,
        share: list[_Copy],
        ready: torch.cuda.Event | None,
        manifest: Manifest,
        counts: dict[str, Any],
        val_loss: float | None,
    ) -> None:
        """Write the checkpoint, commit it on rank 0 and drop old ones, in the background; a failure is left in
        `_error`."""
        began = time.monotonic()
        checkpoint = self._run.checkpoints / checkpoint_name(manifest.step, self._group)
        rank = self._trainer.mesh.rank

        def write_own() -> dict[str, FileEntry]:
            try:
                self._copy(share, ready)
            finally:
                self._copied.set()
            written = {}
            for part in PARTS:
                slices = {copy.name: copy.slice for copy in share if copy.part == part}
                written[f"{part}/{file_name(rank)}"] = save_slices(checkpoint / part, slices, rank, self._on_piece)
            return written

        def finish() -> None:
            if rank == 0:
                files = {name: entry for own in written for name, entry in own.items()}
                write_json(self._run.routing / f"{checkpoint.name}.json", counts)
                commit(checkpoint, manifest.model_copy(update={"files": files}))
                spent = {"pause": self._pause, "seconds": time.monotonic() - began}
                events.record(self._run, "checkpoint", step=manifest.step, name=checkpoint.name, **spent)
                self._drop_surplus(manifest.step, val_loss)

        try:
            written = self._everywhere(write_own, checkpoint)
            self._everywhere(finish, checkpoint)
        except Exception as e:
            self._error = e

    def _everywhere(self, action: Callable[[], T], checkpoint: Location) -> list[T]:
        """Run an action on every rank, and return the results of all ranks.

        Raises:
            CheckpointError: the action failed on a rank; raised on all ranks.
        """
        failure = None
        done: tuple[T | None, str | None] = (None, None)
        try:
            done = (action(), None)
        except Exception as e:
            failure = e
            done = (None, (isinstance(e, OSError) and e.strerror) or f"{type(e).__name__}: {e}")
        every = [done]
        if self._peers:
            every = [done] * self._trainer.mesh.world
            dist.all_gather_object(every, done, group=self._peers)
        for rank, (_, why) in enumerate(every):
            if why:
                raise CheckpointError(
                    f"checkpoint {checkpoint}", f"rank {rank} cannot write it: {why}", _FIX
                ) from failure
        return cast("list[T]", [result for result, _ in every])

    def _drop_surplus(self, step: int, val_loss: float | None) -> None:
        """Drop checkpoints that are not to be kept; a failure causes a warning only.

        A failure is no reason to end training, nor to regard the new checkpoint as one that failed.
        """
        try:
            surplus = self._retention.surplus(step, val_loss) if self._retention else []
        except OSError as e:
            print(f"warning: nobody can tell which checkpoints of {self._run.path} to remove: {e}")
            return
        for old in surplus:
            try:
                drop(old)
                events.record(self._run, "dropped_checkpoint", name=old.name)
            except (OSError, StorageError) as e:
                print(f"warning: {old} cannot be removed: {e}")
