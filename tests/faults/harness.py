"""Faults injected into runs while they train, and the check that the training is that of an undisturbed run.

All comparisons are exact. On CPUs, a step of as many workers computes the same bits again: exchanges add in a fixed
order, and everything that is drawn depends on the step alone.
"""

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

from mhmoe_ray.checkpoint.manifest import MANIFEST, committed_checkpoints, read_manifest, uncommitted_checkpoints
from mhmoe_ray.runs import history, metrics
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.storage import Location
from tests.cli.audit import assert_samples_in_order
from tests.cli.conftest import write_spec
from tests.cli.run import mhmoe
from tests.specs import tiny_spec
from tests.watch import newest, start_events, step_of, wait_until

EXACT_METRICS = (metrics.LOSS, metrics.GRAD_NORM, metrics.BALANCE, metrics.TOKENS, metrics.STREAM, metrics.LR)


def spec_in(folder: Path, **sections: dict[str, Any]) -> None:
    """Write a spec with document masks, and with dropout and jitter, so that draws matter.

    Its runs save a checkpoint every 5 steps.
    """
    moe = tiny_spec().model.model_dump()["moe"] | {"jitter": 0.1}
    defaults: dict[str, dict[str, Any]] = {
        "model": {"dropout": 0.1, "document_masks": True, "moe": moe},
        "train": {"validate_every": 40, "checkpoint_every": 5},
        "cluster": {"workers": 2, "ep": 2, "max_failures": 1000},
    }
    write_spec(folder, **{k: {**defaults.get(k, {}), **sections.get(k, {})} for k in {*defaults, *sections}})


def submit(folder: Path) -> RunDir:
    result = mhmoe(folder, "submit", "spec.yaml", "--detach")
    assert result.code == 0, result.err
    return newest(folder)


def workers(run: RunDir, start: int) -> list[dict[str, Any]]:
    """Return the workers of the start of this number, counted from 1, once it has done its first step."""
    [event] = wait_until(lambda: start_events(run)[start - 1 : start], f"start {start} of the workers")
    group = event["group"]
    wait_until(lambda: (line := history.last_line(run)) and line[metrics.GROUP] >= group, f"a step of start {start}")
    return event["workers"]


def kill(pid: int, signal_number: signal.Signals = signal.SIGKILL) -> bool:
    """Send a signal to a process, and return whether the process existed."""
    try:
        os.kill(pid, signal_number)
    except ProcessLookupError:
        return False
    return True


def stop_during_checkpoint(run: RunDir, pid: int) -> Location | None:
    """Stop a rank while a checkpoint has no manifest yet, and return that checkpoint.

    Where there is none just now, the rank goes on, and None is returned.
    """
    for folder in uncommitted_checkpoints(run):
        kill(pid, signal.SIGSTOP)
        if not (folder / MANIFEST).exists():
            return folder
        kill(pid, signal.SIGCONT)
    return None


def assert_equals_undisturbed_run(run: RunDir, reference: RunDir) -> None:
    """Assert that a run equals an undisturbed one in all bits.

    It has every step once, on the ordered samples, with the same losses, and at the end the same parameters and
    moments.
    """
    assert_samples_in_order(run)
    for line, expected in zip(history.read(run), history.read(reference), strict=True):
        assert {key: line[key] for key in EXACT_METRICS} == {key: expected[key] for key in EXACT_METRICS}
    actual, expected = (read_manifest(committed_checkpoints(r)[-1]) for r in (run, reference))
    assert (actual.step, actual.tokens, actual.position) == (expected.step, expected.tokens, expected.position)
    assert actual.files == expected.files  # sizes and hashes


def driver_of(run: RunDir) -> int:
    """Return the process id of the run's newest job, or 0 where there is none."""
    for status in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = status.read_bytes().split(b"\0")
        except OSError:
            continue
        if (
            b"mhmoe_ray.train.job" in words
            and any(word.startswith(f"{run.id}-".encode()) for word in words)
            and b"python" in words[0]
        ):
            return int(status.parent.name)
    return 0


def soak(folder: Path, run: RunDir, kills: int, seed: int) -> None:
    """Kill processes of a run at random moments: most often a worker, sometimes all of them or the driver.

    A run whose driver is killed is resumed.
    """
    rng = random.Random(seed)
    start = 0
    for number in range(kills):
        start = max(start + 1, len(start_events(run)))
        worker_pids = workers(run, start)
        time.sleep(rng.uniform(0, 3))
        target = rng.choices(["worker", "all", "driver"], [8, 1, 1])[0]
        step_before = step_of(run)
        if target == "driver":
            driver = driver_of(run)
            assert driver
            assert kill(driver)
            wait_until(lambda: outcome(folder, run) == "failed", "the job's end")
            assert mhmoe(folder, "resume", run.id, "--detach").code == 0
        else:
            hit = worker_pids if target == "all" else [rng.choice(worker_pids)]
            killed = [kill(w["pid"]) for w in hit]
            assert any(killed), "the run ended before the kill"
        print(f"kill {number + 1} of {kills} (seed {seed}): {target} after step {step_before}", flush=True)


def outcome(folder: Path, run: RunDir) -> str:
    """Return the run's state as `status` gives it, from the directory and the cluster."""
    return json.loads(mhmoe(folder, "status", str(run.path), "--json").out)["state"]
