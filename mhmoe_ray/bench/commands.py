"""Latency of commands, run as processes: help, status of a long run, and submit until the first sign of its job."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from mhmoe_ray.bench.timing import interleaved
from mhmoe_ray.errors import JobError
from mhmoe_ray.runs import events, metrics
from mhmoe_ray.runs.directory import Attempt, RunDir, add_attempt, create_run
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.storage import location

MOST_SECONDS = 60.0
"""Timeout in seconds for the first sign of a job."""


class Commands(NamedTuple):
    help: list[float]
    """Seconds, one value per round."""
    status: list[float]
    submit: list[float]
    """Seconds from the call to the first event that the job itself recorded; empty if there was no spec to submit."""


def measure(spec: RunSpec, spec_file: Path | None, folder: Path, lines: int, rounds: int) -> Commands:
    """Measure the latency of `mhmoe --help`, `mhmoe status` and `mhmoe submit`.

    Args:
        spec: the spec of the long run, whose metrics are made up.
        spec_file: the spec to submit, on the cluster that runs already; None to leave submit out.
        folder: an empty folder in which the long run is created.
        lines: the number of lines in the metrics of the long run.
        rounds: the number of rounds of each command.
    """
    long = _long_run(spec.model_copy(update={"storage": folder}), lines)
    cases: dict[str, Callable[[], object]] = {
        "help": partial(_command, "--help"),
        "status": partial(_command, "status", str(long.path), "--json"),
    }
    timings = interleaved(cases, rounds)
    submitted = [_submit(spec_file) for _ in range(rounds)] if spec_file else []
    return Commands(timings["help"].seconds, timings["status"].seconds, submitted)


def _command(*args: str) -> str:
    command = [sys.executable, "-m", "mhmoe_ray.cli.app", *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise JobError(f"mhmoe {args[0]}", done.stderr.strip(), "see what it says")
    return done.stdout


def _long_run(spec: RunSpec, lines: int) -> RunDir:
    """Create a finished run of `lines` steps, with one line of metrics per step."""
    run = create_run(spec.model_copy(update={"train": spec.train.model_copy(update={"steps": lines})}))
    add_attempt(run, Attempt("none", "http://127.0.0.1:1", local=True))
    line = {
        metrics.GROUP: 1,
        metrics.LOSS: 3.25,
        metrics.GRAD_NORM: 0.125,
        metrics.LR: 1e-3,
        metrics.TOKENS_PER_S: 1e4,
        metrics.DATA_WAIT: 0.001,
        metrics.STREAM: "0123456789abcdef",
        metrics.DROPPED: 0.0,
        metrics.BALANCE: 1.01,
        metrics.LEAST_EXPERT: 0.8,
        metrics.ENTROPY: 0.99,
    }
    assert isinstance(run.metrics_file, Path)
    with run.metrics_file.open("w") as f:
        for step in range(1, lines + 1):
            validated = {metrics.VAL_LOSS: 3.3} if step % spec.train.validate_every == 0 else {}
            when = {metrics.STEP: step, metrics.TIME: 1e9 + step, metrics.TOKENS: step * 1000}
            f.write(json.dumps({**when, **line, **validated}) + "\n")
    events.record(run, "finished", step=lines)
    return run


def _submit(spec_file: Path) -> float:
    """Submit a spec and return the seconds until the job's first event; then stop the run, whose folder stays."""
    began = time.time()
    run = RunDir(location(json.loads(_command("submit", str(spec_file), "--detach", "--json"))["path"]))
    try:
        while time.time() - began < MOST_SECONDS:
            if first := next((e for e in events.events(run) if e["event"] != "submitted"), None):
                if first["event"] == "failed":
                    raise JobError(f"run {run.id}", first["reason"], "see `mhmoe logs`")
                return float(first["time"]) - began
            time.sleep(0.05)
        raise JobError(f"run {run.id}", f"no sign of its job in {MOST_SECONDS:.0f} s", "see `mhmoe logs`")
    finally:
        if not events.is_over(events.state(events.events(run))):
            _command("stop", str(run.path), "--now")
