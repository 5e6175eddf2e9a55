"""How long a checkpoint holds training up, beside `torch.save` of the same state, and what memory it takes."""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mhmoe_ray.bench.steps import Case
from mhmoe_ray.bench.timing import Hardware, clock, turns
from mhmoe_ray.checkpoint.manifest import committed
from mhmoe_ray.checkpoint.save import Saver
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import create_run
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.storage import remove_tree


class Figures(NamedTuple):
    """Seconds, one for each round but the first, in which buffers are made."""

    state: int
    """Bytes of weights and moments."""
    steps: list[float]
    """Training steps while nothing is written."""
    beside: list[float]
    """Training steps beside a checkpoint that is written, pauses included."""
    torch_save: list[float]
    """Of all of it, to a file; not forced onto the disk."""
    pauses: list[float]
    """For which training waits: before it goes on, and before the next update, until there is a copy."""
    committed: list[float]
    """Until the checkpoint counts: on the disk, with hashes; training goes on beside it."""
    extra: int | None
    """Bytes of resident memory that the first checkpoint took beyond training's own; where the system tells it."""

    @property
    def pause_to_torch_save(self) -> float:
        return statistics.median(self.pauses) / statistics.median(self.torch_save)

    @property
    def extra_to_state(self) -> float | None:
        return None if self.extra is None else self.extra / self.state

    def as_json(self) -> dict[str, Any]:
        return {
            **self._asdict(),
            "pause_to_torch_save": self.pause_to_torch_save,
            "extra_to_state": self.extra_to_state,
        }


def measure(spec: RunSpec, rounds: int, folder: Path, hardware: Hardware) -> Figures:
    """Both ways, and a step by itself, in turn.

    Args:
        spec: what is trained.
        rounds: that are counted.
        folder: on the disk to write to; empty.
        hardware: to train on.
    """
    spec = _placed(spec, folder)
    run = create_run(spec)
    run.tokenizer_file.touch()
    case = Case(spec, hardware.device)
    case.step()
    saver, file = Saver(run, case.trainer, group=1), folder / "torch.pt"
    state = [(f"{part}.{name}", t) for part, name, t in case.trainer.strategy.state()]
    read = clock(hardware.device)
    found = Figures(sum(t.nbytes for _, t in state), [], [], [], [], [], None)

    def nothing() -> None:
        found.steps.append(_timed(case.step, read))

    def synchronous() -> None:
        found.torch_save.append(_timed(lambda: torch.save(dict(state), file), read))
        file.unlink()

    def asynchronous() -> None:
        began = read()
        saver.save(case.trainer.zero_counts())
        found.beside.append(_timed(case.step, read))
        saver.wait()
        found.committed.append(read() - began)
        found.pauses.append(next(e["pause"] for e in reversed(events.events(run)) if e["event"] == "checkpoint"))
        remove_tree(committed(run)[-1])

    training, saving = _settled(case.step, found.state // 100), _peak_resident(asynchronous)
    if training and saving:
        found = found._replace(extra=saving - training)
    synchronous()
    for warm_up in (found.pauses, found.committed, found.beside, found.torch_save):
        warm_up.clear()
    for _, way in turns((nothing, asynchronous, synchronous), rounds):
        way()
    return found


def _placed(spec: RunSpec, folder: Path) -> RunSpec:
    """With a run directory there, and the manifest of data that a checkpoint names."""
    prepared = folder / "prepared"
    prepared.mkdir()
    (prepared / "manifest.json").write_text("{}")
    data = spec.data.model_copy(update={"prepared": prepared})
    return spec.model_copy(update={"storage": folder / "runs", "data": data})


def _timed(action: Callable[[], object], read: Callable[[], float]) -> float:
    began = read()
    action()
    return read() - began


def _settled(action: Callable[[], object], slight: int) -> int | None:
    """The peak of an action that has been done until 8 times in a row raised it by next to nothing, at most 64 times:
    what the C library keeps for its use grows for the first tens of steps, and would pass for the checkpoint's."""
    peak, still = _peak_resident(action), 0
    for _ in range(64):
        before, peak = peak, _peak_resident(action)
        if before is None or peak is None:
            break
        still = still + 1 if peak < before + slight else 0
        if still == 8:
            break
    return peak


def _peak_resident(action: Callable[[], object]) -> int | None:
    """The most memory that this process has in use while it runs, in bytes; None where the system does not tell."""
    status = Path("/proc/self/status")
    if status.exists():
        Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
    action()
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)
