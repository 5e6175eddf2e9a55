"""Runs that are hurt while they train, and what must be left of them: the very training that nobody hurt.

All compares exactly. On CPUs, a step of as many workers computes the same bits again: exchanges add in a fixed order,
and all that is drawn depends on the step alone.
"""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from mhmoe_ray.runs import events, metrics
from mhmoe_ray.runs.layout import RunDir, list_runs
from mhmoe_ray.runs.manifest import committed, read_manifest
from tests.cli.audit import assert_read_as_ordered
from tests.cli.conftest import write_spec
from tests.cli.run import mhmoe
from tests.specs import tiny_spec

T = TypeVar("T")
LIMIT = 150.0
"""Seconds within which whatever is waited for must have come: a watchdog of the tests, not a measurement."""
EXACT = (metrics.LOSS, metrics.GRAD_NORM, metrics.BALANCE, metrics.TOKENS, metrics.STREAM, metrics.LR)


def spec_in(folder: Path, **sections: dict[str, Any]) -> None:
    """Write a spec with dropout and jitter, so that what is drawn matters, which saves every 5 steps."""
    moe = tiny_spec().model.model_dump()["moe"] | {"jitter": 0.1}
    defaults: dict[str, dict[str, Any]] = {
        "model": {"dropout": 0.1, "moe": moe},
        "train": {"validate_every": 40, "checkpoint_every": 5},
        "cluster": {"workers": 2, "ep": 2, "max_failures": 1000, "hang_seconds": 15},
    }
    write_spec(folder, **{k: {**defaults.get(k, {}), **sections.get(k, {})} for k in {*defaults, *sections}})


def submit(folder: Path) -> RunDir:
    result = mhmoe(folder, "submit", "spec.yaml", "--detach")
    assert result.code == 0, result.err
    return list_runs(folder / "runs")[-1]


def wait_until(condition: Callable[[], T], what: str, seconds: float = LIMIT) -> T:
    """What the condition gives, once that is something."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.02)
    return value


def of_kind(run: RunDir, kind: str) -> list[dict[str, Any]]:
    return [e for e in events.events(run) if e["event"] == kind]


def step_of(run: RunDir) -> int:
    last = metrics.last(run)
    return last[metrics.STEP] if last else 0


def workers(run: RunDir, start: int) -> list[dict[str, Any]]:
    """Those of the start of this number, from 1, once it has done its first step."""
    started = wait_until(lambda: of_kind(run, "started")[start - 1 : start], f"start {start} of the workers")[0]
    group = started["group"]
    wait_until(lambda: (line := metrics.last(run)) and line[metrics.GROUP] >= group, f"a step of start {start}")
    return started["workers"]


def is_over(run: RunDir) -> bool:
    return events.is_over(events.state(events.events(run)))


def wait_for_the_end(run: RunDir, seconds: float = LIMIT) -> None:
    wait_until(lambda: is_over(run), "the end of the run", seconds)
    happened = events.events(run)
    assert events.state(happened) == "finished", happened[-3:]


def kill(pid: int, how: signal.Signals = signal.SIGKILL) -> bool:
    """Whether the process was there."""
    try:
        os.kill(pid, how)
    except ProcessLookupError:
        return False
    return True


def assert_as_if_nothing_had_happened(run: RunDir, reference: RunDir) -> None:
    """Every step once, on the ordered samples, with the losses, and at the end the parameters and moments, of a run
    that nobody hurt: all bits."""
    assert_read_as_ordered(run)
    for line, expected in zip(metrics.history(run), metrics.history(reference), strict=True):
        assert {key: line[key] for key in EXACT} == {key: expected[key] for key in EXACT}
    found, expected = (read_manifest(committed(r)[-1]) for r in (run, reference))
    assert (found.step, found.tokens, found.position) == (expected.step, expected.tokens, expected.position)
    assert found.files == expected.files  # sizes and hashes


def driver_of(run: RunDir) -> int:
    """The process of the run's newest job."""
    for status in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = status.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"mhmoe_ray.train.driver" in words and str(run.path).encode() in words and b"python" in words[0]:
            return int(status.parent.name)
    return 0


def soak(folder: Path, run: RunDir, kills: int, seed: int) -> None:
    """Kill processes of a run at random moments: most often a worker, sometimes all of them, or the driver, after which
    the run is resumed."""
    rng = random.Random(seed)
    start = 0
    for number in range(kills):
        start = max(start + 1, len(of_kind(run, "started")))
        own = workers(run, start)
        time.sleep(rng.uniform(0, 3))
        target = rng.choices(["worker", "all", "driver"], [8, 1, 1])[0]
        at = step_of(run)
        if target == "driver":
            assert kill(driver_of(run))
            wait_until(lambda: outcome(folder, run) == "failed", "the job's end")
            assert mhmoe(folder, "resume", run.id, "--detach").code == 0
        else:
            hit = own if target == "all" else [rng.choice(own)]
            killed = [kill(w["pid"]) for w in hit]
            assert any(killed), "the run ended before it was hurt"
        print(f"kill {number + 1} of {kills} (seed {seed}): {target} after step {at}", flush=True)


def outcome(folder: Path, run: RunDir) -> str:
    """As `status` says it, from the directory and the cluster."""
    return json.loads(mhmoe(folder, "status", str(run.path), "--json").out)["state"]
