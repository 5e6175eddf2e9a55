"""Latency of `mhmoe --help`, of `mhmoe status` on a long run, and of `mhmoe submit` until its job's first event."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

from mhmoe_ray.bench.timing import time_interleaved
from mhmoe_ray.errors import JobError
from mhmoe_ray.runs import events, metrics
from mhmoe_ray.runs.directory import Attempt, RunDir, add_attempt, create_run
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.storage import location
from tests.benchmarks.harness import Results

EVENT_TIMEOUT = 60.0
"""Timeout in seconds for the first event of a job."""


def measure(spec: RunSpec, spec_file: Path | None, folder: Path, lines: int, rounds: int) -> Results:
    """Measure the latency of `mhmoe --help`, `mhmoe status` and `mhmoe submit`; a failed command or job is a JobError.

    `spec` is that of a long run with `lines` synthetic lines of metrics, which is created in the empty `folder`.
    `spec_file` is submitted to the running cluster, and timed from the call to the first event that the job itself
    records; None leaves submit out.
    """
    long_run = _long_run(spec.model_copy(update={"storage": folder}), lines)
    cases: dict[str, Callable[[], object]] = {
        "help": partial(_run_command, "--help"),
        "status": partial(_run_command, "status", str(long_run.path), "--json"),
    }
    seconds = {name: timing.seconds for name, timing in time_interleaved(cases, rounds).items()}
    seconds["submit"] = [_submit(spec_file) for _ in range(rounds)] if spec_file else []
    titles = {
        "help": "mhmoe --help",
        "status": f"mhmoe status, {lines:,} lines",
        "submit": "mhmoe submit, to the job's first sign",
    }
    rows = [
        (titles[name], f"{median(values):.2f} s", f"{max(values):.2f} s") for name, values in seconds.items() if values
    ]
    return Results(f"{rounds} rounds", ("", "median", "longest"), rows, {"lines": lines, **seconds})


def _run_command(*args: str) -> str:
    command = [sys.executable, "-m", "mhmoe_ray.cli.app", *args]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        raise JobError(f"mhmoe {args[0]}", process.stderr.strip(), "fix the cause and measure again")
    return process.stdout


def _long_run(spec: RunSpec, lines: int) -> RunDir:
    run = create_run(spec.model_copy(update={"train": spec.train.model_copy(update={"steps": lines})}))
    # Every run needs an attempt, which names its job and cluster. No cluster listens at this address, and none is
    # needed: commands do not ask the cluster of a finished run.
    add_attempt(run, Attempt("none", "http://127.0.0.1:1", local=True))
    constant_metrics = {
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
            validation_metrics = {metrics.VAL_LOSS: 3.3} if step % spec.train.validate_every == 0 else {}
            step_metrics = {metrics.STEP: step, metrics.TIME: 1e9 + step, metrics.TOKENS: step * 1000}
            f.write(json.dumps({**step_metrics, **constant_metrics, **validation_metrics}) + "\n")
    events.record(run, "finished", step=lines)
    return run


def _submit(spec_file: Path) -> float:
    """Submit a spec, and return the seconds until the job's first event.

    The run is stopped; its run directory stays.
    """
    # The end of the measurement is the wall-clock time of an event that another process records. The start must be read
    # from the same clock, so the monotonic clock does not fit.
    start_time = time.time()
    run = RunDir(location(json.loads(_run_command("submit", str(spec_file), "--detach", "--json"))["path"]))
    try:
        while time.time() - start_time < EVENT_TIMEOUT:
            # The command `submit` itself records the event `submitted`, so this event does not show that the job runs.
            if first_event := next((e for e in events.read(run) if e["event"] != "submitted"), None):
                if first_event["event"] == "failed":
                    raise JobError(f"run {run.id}", first_event["reason"], "see `mhmoe logs`")
                return float(first_event["time"]) - start_time
            time.sleep(0.05)
        raise JobError(f"run {run.id}", f"its job recorded no event in {EVENT_TIMEOUT:.0f} s", "see `mhmoe logs`")
    finally:
        # `mhmoe stop` fails for a run that is over, and a run whose job failed is over already.
        if not events.is_end_state(events.state(events.read(run))):
            _run_command("stop", str(run.path), "--now")
