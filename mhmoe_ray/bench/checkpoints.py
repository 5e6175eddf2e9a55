"""Model in training whose state is saved as a checkpoint or by `torch.save`, to compare how long both block it."""

from pathlib import Path
from typing import NamedTuple

import torch

from mhmoe_ray.bench.steps import StepCase
from mhmoe_ray.bench.timing import device_clock
from mhmoe_ray.checkpoint.manifest import committed_checkpoints
from mhmoe_ray.checkpoint.save import Saver
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import create_run
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.storage import remove_tree


class CheckpointSeconds(NamedTuple):
    """Seconds of a checkpoint and of the training step meanwhile."""

    step: float
    """Training step with the pause."""
    pause: float
    """Waits of training: at the checkpoint's start, and before the next update until the state is copied."""
    committed: float
    """Time until the checkpoint is complete, on the disk and with hashes; training continues meanwhile."""


class CheckpointCase(StepCase):
    """Model in training, with a run in an empty folder; each method measures one way to save it, and removes the files.

    The first checkpoint allocates buffers, which all later ones reuse.
    """

    def __init__(self, spec: RunSpec, folder: Path, device: torch.device) -> None:
        spec = _with_folders(spec, folder)
        super().__init__(spec, device)
        self._run = create_run(spec)
        # The saver records the hash of the tokenizer file in each checkpoint, so the file must exist. It may be empty,
        # because nothing is tokenized here.
        self._run.tokenizer_file.touch()
        self._torch_file, self._read_clock = folder / "torch.pt", device_clock(device)
        # AdamW creates its moments at the first update. A checkpoint includes them, so one step runs before the state
        # is saved.
        self.step()
        self._saver = Saver(self._run, self.trainer, group=1)
        self._state = {f"{part}.{name}": t for part, name, t in self.trainer.strategy.checkpoint_tensors()}

    @property
    def state_bytes(self) -> int:
        """Bytes of weights and of the optimizer's moments."""
        return sum(t.nbytes for t in self._state.values())

    def time_step(self) -> float:
        """Return the seconds of a training step while no checkpoint is written."""
        start_time = self._read_clock()
        self.step()
        return self._read_clock() - start_time

    def time_torch_save(self) -> float:
        """Return the seconds of `torch.save` with the whole state to a file, which is not flushed to the disk."""
        start_time = self._read_clock()
        torch.save(self._state, self._torch_file)
        seconds = self._read_clock() - start_time
        self._torch_file.unlink()
        return seconds

    def time_checkpoint(self) -> CheckpointSeconds:
        """Save a checkpoint during a training step, and return the seconds of both."""
        counts = self.trainer.zero_counts()
        start_time = self._read_clock()
        self._saver.save(counts)
        self.step()
        step_seconds = self._read_clock() - start_time
        self._saver.wait()
        event = events.newest_event(events.read(self._run), "checkpoint")
        assert event is not None
        remove_tree(committed_checkpoints(self._run)[-1])
        return CheckpointSeconds(step_seconds, event["pause"], event["seconds"])


def _with_folders(spec: RunSpec, folder: Path) -> RunSpec:
    # The measurement reads no data, but the saver records the hash of this manifest in each checkpoint, so the manifest
    # must exist.
    prepared = folder / "prepared"
    prepared.mkdir()
    (prepared / "manifest.json").write_text("{}")
    data = spec.data.model_copy(update={"prepared": prepared})
    return spec.model_copy(update={"storage": folder / "runs", "data": data})
