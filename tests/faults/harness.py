"""Faults for runs while they train, and the check that a disturbed run equals an undisturbed one.

All comparisons are exact. On CPUs, a step that is repeated with the same number of workers gives the same bits:
collectives add in a fixed order, and random draws depend only on the step.
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
from mhmoe_ray.storage import Location, replace_file
from tests.cli.audit import assert_samples_in_order
from tests.cli.conftest import write_spec
from tests.cli.run import mhmoe
from tests.support.specs import tiny_spec
from tests.support.watch import newest_run, start_events, step_of, wait_until

EXACT_METRICS = (metrics.LOSS, metrics.GRAD_NORM, metrics.BALANCE, metrics.TOKENS, metrics.STREAM, metrics.LR)


def write_random_spec(folder: Path, **sections: dict[str, Any]) -> None:
    """Write a spec with random draws, dropout and router jitter, and with document masks, to `folder`/spec.yaml.

    Its runs have 2 workers, save a checkpoint every 5 steps and tolerate 1000 failures. `sections` has keys that
    replace these, as a mapping for each section of the spec.
    """
    moe = tiny_spec().model.model_dump()["moe"] | {"jitter": 0.1}
    defaults: dict[str, dict[str, Any]] = {
        "model": {"dropout": 0.1, "document_masks": True, "moe": moe},
        "train": {"validate_every": 40, "checkpoint_every": 5},
        "cluster": {"workers": 2, "ep": 2, "max_failures": 1000},
    }
    write_spec(folder, **{k: {**defaults.get(k, {}), **sections.get(k, {})} for k in {*defaults, *sections}})


def submit(folder: Path) -> RunDir:
    """Submit `folder`/spec.yaml without following the run, and return the run."""
    result = mhmoe(folder, "submit", "spec.yaml", "--detach")
    assert result.code == 0, result.err
    return newest_run(folder)


def workers_of_start(run: RunDir, start: int) -> list[dict[str, Any]]:
    """Wait for the first step after the workers were started for the `start`-th time, and return those workers.

    The first start has number 1. A worker is given by its rank, process id and host.
    """
    [event] = wait_until(lambda: start_events(run)[start - 1 : start], f"start {start} of the workers")
    group = event["group"]
    wait_until(lambda: (line := history.last_line(run)) and line[metrics.GROUP] >= group, f"a step of start {start}")
    return event["workers"]


def kill(pid: int, signal_number: signal.Signals = signal.SIGKILL) -> bool:
    """Send a signal, by default SIGKILL, to a process, and return whether the process existed."""
    try:
        os.kill(pid, signal_number)
    except ProcessLookupError:
        return False
    return True


def stop_during_checkpoint(run: RunDir, pid: int) -> Location | None:
    """Suspend the process `pid` of a run by SIGSTOP if the run is writing a checkpoint, and return that checkpoint.

    Otherwise the process continues, and None is returned. A checkpoint is being written while it has no manifest.
    """
    for folder in uncommitted_checkpoints(run):
        kill(pid, signal.SIGSTOP)
        if not (folder / MANIFEST).exists():
            return folder
        kill(pid, signal.SIGCONT)
    return None


def assert_equals_undisturbed_run(run: RunDir, reference: RunDir) -> None:
    """Assert that a finished run equals an undisturbed one in all bits.

    It has every step once, with the right samples and the same metrics, and its last checkpoint has the same parameters
    and optimizer state.
    """
    assert_samples_in_order(run)
    for line, expected in zip(history.read(run), history.read(reference), strict=True):
        differences = {key: (line[key], expected[key]) for key in EXACT_METRICS if line[key] != expected[key]}
        assert not differences, f"step {line[metrics.STEP]} of worker group {line[metrics.GROUP]}: {differences}"
    actual, expected = (read_manifest(committed_checkpoints(r)[-1]) for r in (run, reference))
    assert (actual.step, actual.tokens, actual.position) == (expected.step, expected.tokens, expected.position)
    assert actual.files == expected.files  # `files` has the size and hash of each file


def assert_same_files(folder: Path, expected_folder: Path) -> None:
    """Assert that two folders have the same files, with equal contents."""
    contents, expected_contents = (
        {p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in (folder, expected_folder)
    )
    assert contents.keys() == expected_contents.keys()
    assert [name for name, content in contents.items() if content != expected_contents[name]] == []


def driver_of(run: RunDir) -> int:
    """Return the process id of the job that drives the run, or 0 if no such job runs on this machine."""
    for cmdline_file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = cmdline_file.read_bytes().split(b"\0")
        except OSError:
            continue
        if (
            b"mhmoe_ray.train.job" in words
            and any(word.startswith(f"{run.id}-".encode()) for word in words)
            and b"python" in words[0]
        ):
            return int(cmdline_file.parent.name)
    return 0


def soak(folder: Path, run: RunDir, kills: int, seed: int) -> None:
    """Kill processes of a run `kills` times at random moments: mostly one worker, sometimes all workers or the driver.

    A run whose driver is killed is resumed.

    Args:
        folder: The project folder.
        run: The run, which must not end before the last kill.
        kills: The number of kills.
        seed: The seed of the random choices.
    """
    rng = random.Random(seed)
    start = 0
    for number in range(kills):
        start = max(start + 1, len(start_events(run)))
        worker_pids = workers_of_start(run, start)
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
            target_workers = worker_pids if target == "all" else [rng.choice(worker_pids)]
            was_alive = [kill(w["pid"]) for w in target_workers]
            assert any(was_alive), "the run ended before the kill"
        print(f"kill {number + 1} of {kills} (seed {seed}): {target} after step {step_before}", flush=True)


def outcome(folder: Path, run: RunDir) -> str:
    """Return the run's state, such as "failed", as `mhmoe status` reports it."""
    return json.loads(mhmoe(folder, "status", str(run.path), "--json").out)["state"]


def disturbing_environment(**variables: str) -> dict[str, Any]:
    """Return the cluster section of a spec whose job and workers are disturbed, as disturbed/sitecustomize.py says."""
    folders = [str(Path(__file__).parent / "disturbed"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"runtime_env": {"env_vars": {**variables, "PYTHONPATH": os.pathsep.join(folders)}}}


def run_code(folder: Path, pid: int, code: str) -> None:
    """Run code in a process of a run that has `disturbing_environment(CODE=folder)`."""
    replace_file(folder / str(pid), code.encode())
