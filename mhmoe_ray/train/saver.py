"""Checkpoints written while training goes on: a step waits for a copy of the state in memory, not for storage.

    training    | step 100 | copy | step 101 | step 102 | step 103 | ...
    background              | write own file of each part, hash it | tell the others | rank 0: manifest = commit |

Each rank copies and writes its own share only (`runs.tensors.Shares`), into buffers that stay. Ranks meet in a process
group of their own, since training's may be in use. One checkpoint is under way at a time: the next one waits for it.
"""

import time
from collections.abc import Callable
from threading import Thread
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mhmoe_ray.errors import CheckpointError
from mhmoe_ray.location import Location
from mhmoe_ray.runs import events
from mhmoe_ray.runs.files import write_json
from mhmoe_ray.runs.layout import RunDir
from mhmoe_ray.runs.manifest import PARTS, FileEntry, Manifest, checkpoint_name, commit, describe_file
from mhmoe_ray.runs.retention import drop, surplus
from mhmoe_ray.runs.slices import Slice, slice_of
from mhmoe_ray.runs.tensors import Shares, file_name, save_slices
from mhmoe_ray.train.step import Trainer

T = TypeVar("T")
_FIX = "make room or mend the storage, then `mhmoe resume`: the checkpoint before it is whole"


class Saver:
    """Of one rank. All ranks call the same methods in the same order."""

    def __init__(self, run: RunDir, trainer: Trainer, group: int) -> None:
        """Args:
        run: that the checkpoints are of.
        trainer: whose state they are.
        group: number of this start of the workers, in the checkpoints' names: no other start writes to the same.
        """
        self._run, self._trainer, self._group = run, trainer, group
        self._peers = dist.new_group(backend="gloo") if trainer.mesh.world > 1 else None
        self._copies: dict[tuple[str, str], torch.Tensor] = {}
        self._thread: Thread | None = None
        self._error: Exception | None = None

    def save(self, count_LE: torch.Tensor) -> None:
        """Copy the state and begin to write it; returns when training may change it.

        Args:
            count_LE: routes per layer and expert since the checkpoint before, for rank 0 to write beside it.

        Raises:
            CheckpointError: the one before could not be written.
        """
        began = time.monotonic()
        self.wait()
        slices, manifest = self._copied(), self._manifest()
        counts = {"step": manifest.step, "routes_per_layer_and_expert": count_LE.tolist()}
        pause = time.monotonic() - began
        self._thread = Thread(target=self._write, args=(slices, manifest, counts, pause), name="saver", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is under way.

        Raises:
            CheckpointError: it could not be written, by any rank.
        """
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._error:
            raise self._error

    @property
    def failed(self) -> bool:
        """Whether `wait` would raise. Ranks learn of it at different moments: agree before acting on it."""
        return self._error is not None

    def _copied(self) -> dict[str, dict[str, Slice]]:
        """This rank's share of each part, in memory that training does not touch."""
        shares, slices = Shares(), {part: dict[str, Slice]() for part in PARTS}
        for part, name, tensor in self._trainer.strategy.state():
            if not shares.is_mine(tensor):
                continue
            source = slice_of(tensor)
            copy = self._copies.get((part, name))
            if copy is None:
                pinned = source.local.device.type == "cuda"  # else a copy from there would not be asynchronous
                copy = torch.empty(source.local.shape, dtype=source.local.dtype, pin_memory=pinned)
                self._copies[part, name] = copy
            copy.copy_(source.local, non_blocking=True)
            slices[part][name] = source._replace(local=copy)
        if self._trainer.device.type == "cuda":
            torch.cuda.synchronize(self._trainer.device)
        return slices

    def _manifest(self) -> Manifest:
        """But for its files."""
        trainer, spec = self._trainer, self._trainer.spec
        return Manifest(
            step=trainer.step,
            skipped=trainer.skipped,
            tokens=trainer.tokens,
            position=trainer.step * spec.samples_per_step,
            seed=spec.seed,
            world=trainer.mesh.world,
            ep=trainer.mesh.ep,
            model=spec.model,
            seq_len=spec.data.seq_len,
            data_sha256=describe_file(spec.data.prepared / "manifest.json").sha256,
            tokenizer_sha256=describe_file(self._run.tokenizer_file).sha256,
            files={},
        )

    def _write(
        self, slices: dict[str, dict[str, Slice]], manifest: Manifest, counts: dict[str, Any], pause: float
    ) -> None:
        """In the background."""
        began = time.monotonic()
        checkpoint = self._run.checkpoints / checkpoint_name(manifest.step, self._group)
        rank = self._trainer.mesh.rank

        def write_own() -> dict[str, FileEntry]:
            return {f"{part}/{file_name(rank)}": save_slices(checkpoint / part, s, rank) for part, s in slices.items()}

        def finish() -> None:
            if rank == 0:
                files = {name: entry for own in written for name, entry in own.items()}
                write_json(self._run.routing / f"{checkpoint.name}.json", counts)
                commit(checkpoint, manifest.model_copy(update={"files": files}))
                spent = {"pause": pause, "seconds": time.monotonic() - began}
                events.record(self._run, "checkpoint", step=manifest.step, name=checkpoint.name, **spent)
                self._drop_surplus()

        try:
            written = self._everywhere(write_own, checkpoint)
            self._everywhere(finish, checkpoint)
        except Exception as e:
            self._error = e

    def _everywhere(self, action: Callable[[], T], checkpoint: Location) -> list[T]:
        """What the action gives on each rank.

        Raises:
            CheckpointError: on all ranks, if it fails on any.
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
        return [result for result, _ in every]  # type: ignore[misc]

    def _drop_surplus(self) -> None:
        keep = self._trainer.spec.train.keep_checkpoints
        for old in surplus(self._run, keep) if keep else []:
            try:
                drop(old)
            except OSError as e:  # no reason to end training
                print(f"warning: {old} cannot be removed: {e.strerror}")
            else:
                events.record(self._run, "dropped_checkpoint", name=old.name)
