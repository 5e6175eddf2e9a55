"""Time that a checkpoint blocks training, compared with `torch.save` of the same state, and memory that it takes."""

from collections.abc import Callable
from pathlib import Path
from statistics import median

from mhmoe_ray.bench.checkpoints import CheckpointCase, CheckpointSeconds
from mhmoe_ray.bench.timing import Hardware, measure_rounds
from mhmoe_ray.cli.formats import format_bytes, format_seconds
from mhmoe_ray.spec import RunSpec
from tests.benchmarks.harness import Results


def measure(spec: RunSpec, rounds: int, folder: Path, hardware: Hardware) -> Results:
    """Measure a checkpoint, `torch.save` and a training step without either, in interleaved rounds.

    `folder` is an empty folder on the disk.
    """
    case = CheckpointCase(spec, folder, hardware.device)
    state_bytes = case.state_bytes
    # The first checkpoint allocates the saver's buffers, which all later ones reuse. Only the memory of this checkpoint
    # is measured, and only the times of later ones.
    training_peak, saving_peak = _settled_peak(case.step, state_bytes // 100), _peak_resident(case.time_checkpoint)
    extra_bytes = saving_peak - training_peak if training_peak and saving_peak else None
    case.time_torch_save()
    checkpoints: list[CheckpointSeconds] = []

    def time_checkpoint() -> float:
        checkpoints.append(case.time_checkpoint())
        return checkpoints[-1].step

    cases = {"steps": case.time_step, "beside": time_checkpoint, "torch_save": case.time_torch_save}
    seconds = measure_rounds(cases, rounds, lambda name, _: cases[name]())
    seconds |= {"pauses": [c.pause for c in checkpoints], "committed": [c.committed for c in checkpoints]}
    medians = {name: median(values) for name, values in seconds.items()}
    titles = {
        "torch_save": "torch.save, training waits",
        "pauses": "checkpoint: training waits",
        "committed": "checkpoint: until it is committed",
        "steps": "a training step",
        "beside": "a training step meanwhile",
    }
    rows = [
        (title, format_seconds(medians[name]), f"{medians[name] / medians['torch_save']:.3f}")
        for name, title in titles.items()
    ]
    extra_to_state = None
    if extra_bytes is not None:
        extra_to_state = extra_bytes / state_bytes
        rows.append(("memory, to the state's", format_bytes(extra_bytes), f"{extra_to_state:.3f}"))
    data = {
        **hardware.as_json(),
        "rounds": rounds,
        "state": state_bytes,
        **seconds,
        "extra": extra_bytes,
        "pause_to_torch_save": medians["pauses"] / medians["torch_save"],
        "extra_to_state": extra_to_state,
    }
    title = f"{hardware}; state of {format_bytes(state_bytes)}, medians of {rounds} interleaved rounds"
    return Results(title, ("", "median", "to torch.save"), rows, data)


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
