"""Time that a checkpoint blocks training, compared with `torch.save` of the same state, and memory that it takes."""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mhmoe_ray.bench.steps import Case
from mhmoe_ray.bench.timing import Hardware, device_clock, turns
from mhmoe_ray.checkpoint.manifest import committed_checkpoints
from mhmoe_ray.checkpoint.save import Saver
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import create_run
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.storage import remove_tree


class Figures(NamedTuple):
    """Measurements of checkpoints; lists have the seconds of each round, without the warm-up round."""

    state: int
    """Bytes of weights and of the optimizer's moments."""
    steps: list[float]
    """Training steps while no checkpoint is written."""
    steps_while_writing: list[float]
    """Training steps while a checkpoint is written, including the pauses."""
    torch_save: list[float]
    """Calls of `torch.save` with the whole state to a file, which is not flushed to the disk."""
    pauses: list[float]
    """Waits of training for a checkpoint: at its start, and before the next update until the state is copied."""
    committed: list[float]
    """Times until a checkpoint is complete, on the disk and with hashes; training continues meanwhile."""
    extra: int | None
    """Resident bytes that the first checkpoint took beyond training's own; None if the system does not report them."""

    @property
    def pause_to_torch_save(self) -> float:
        """Ratio of the median pause to the median time of `torch.save`."""
        return statistics.median(self.pauses) / statistics.median(self.torch_save)

    @property
    def extra_to_state(self) -> float | None:
        return None if self.extra is None else self.extra / self.state

    def as_json(self) -> dict[str, Any]:
        """Return the measurements as `mhmoe bench checkpoint --json` prints them."""
        fields = self._asdict()
        return {
            "beside": fields.pop("steps_while_writing"),
            **fields,
            "pause_to_torch_save": self.pause_to_torch_save,
            "extra_to_state": self.extra_to_state,
        }


def measure(spec: RunSpec, rounds: int, folder: Path, hardware: Hardware) -> Figures:
    """Measure a checkpoint, `torch.save` and a training step without either, in interleaved rounds.

    `folder` is an empty folder on the disk.
    """
    spec = _with_folders(spec, folder)
    run = create_run(spec)
    # The saver records the hash of the tokenizer file in each checkpoint, so the file must exist. It may be empty,
    # because nothing is tokenized here.
    run.tokenizer_file.touch()
    case = Case(spec, hardware.device)
    # AdamW creates its moments at the first update. A checkpoint includes them, so one step runs before the state is
    # measured.
    case.step()
    saver, torch_file = Saver(run, case.trainer, group=1), folder / "torch.pt"
    state = [(f"{part}.{name}", t) for part, name, t in case.trainer.strategy.checkpoint_tensors()]
    read_clock = device_clock(hardware.device)
    figures = Figures(sum(t.nbytes for _, t in state), [], [], [], [], [], None)

    def measure_step() -> None:
        figures.steps.append(_time_action(case.step, read_clock))

    def measure_torch_save() -> None:
        figures.torch_save.append(_time_action(lambda: torch.save(dict(state), torch_file), read_clock))
        torch_file.unlink()

    def measure_checkpoint() -> None:
        counts = case.trainer.zero_counts()

        def save_and_step() -> None:
            saver.save(counts)
            case.step()

        figures.steps_while_writing.append(_time_action(save_and_step, read_clock))
        saver.wait()
        event = events.newest_event(events.read(run), "checkpoint")
        assert event is not None
        figures.pauses.append(event["pause"])
        figures.committed.append(event["seconds"])
        remove_tree(committed_checkpoints(run)[-1])

    # The first checkpoint allocates the saver's buffers, which all later ones reuse. Its memory is therefore measured,
    # but its times are cleared below.
    training_peak, saving_peak = _settled_peak(case.step, figures.state // 100), _peak_resident(measure_checkpoint)
    if training_peak and saving_peak:
        figures = figures._replace(extra=saving_peak - training_peak)
    measure_torch_save()
    for timings in (figures.pauses, figures.committed, figures.steps_while_writing, figures.torch_save):
        timings.clear()
    for _, measure_case in turns((measure_step, measure_checkpoint, measure_torch_save), rounds):
        measure_case()
    return figures


def _with_folders(spec: RunSpec, folder: Path) -> RunSpec:
    # The measurement reads no data, but the saver records the hash of this manifest in each checkpoint, so the manifest
    # must exist.
    prepared = folder / "prepared"
    prepared.mkdir()
    (prepared / "manifest.json").write_text("{}")
    data = spec.data.model_copy(update={"prepared": prepared})
    return spec.model_copy(update={"storage": folder / "runs", "data": data})


def _time_action(action: Callable[[], object], read_clock: Callable[[], float]) -> float:
    start_time = read_clock()
    action()
    return read_clock() - start_time


def _settled_peak(action: Callable[[], object], tolerance: int) -> int | None:
    """Repeat an action until its peak memory has settled, and return it in bytes; None if the system reports none.

    It has settled if it grew by less than `tolerance` bytes in each of 8 runs in a row. There are at most 65 runs.
    """
    # During the first tens of steps, the C library keeps more and more freed memory for reuse. The steps are repeated
    # until this growth ends, because otherwise it would count as the checkpoint's memory.
    peak, stable_runs = _peak_resident(action), 0
    for _ in range(64):
        previous_peak, peak = peak, _peak_resident(action)
        if previous_peak is None or peak is None:
            break
        stable_runs = stable_runs + 1 if peak < previous_peak + tolerance else 0
        if stable_runs == 8:
            break
    return peak


def _peak_resident(action: Callable[[], object]) -> int | None:
    """Return this process's peak of resident bytes during `action`; None if the system reports none."""
    status = Path("/proc/self/status")
    if status.exists():
        # Writing 5 resets the process's peak memory (VmHWM) to its current memory, so that the peak below is that of
        # `action`.
        Path("/proc/self/clear_refs").write_text("5")
    action()
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)
