"""Measurements that start Ray: each in a process of its own, so that nothing of one is left for the next."""

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from secrets import token_hex
from typing import Any

from mhmoe_ray.cluster.spawn import PRIVATE
from mhmoe_ray.errors import JobError
from mhmoe_ray.spec import RunSpec

Measurement = Callable[[RunSpec, Path, int], dict[str, Any]]
"""Of a spec, in an empty folder, with so many processes or threads; returns figures that JSON can hold."""


def run_apart(measurement: Measurement, spec: RunSpec, number: int, what: str, **more: str) -> dict[str, Any]:
    """What it returns.

    Args:
        measurement: a function of a module.
        spec: its first argument.
        number: its last.
        what: names it in an error.
        more: variables of its environment.

    Raises:
        JobError: it failed.
    """
    folder = tempfile.mkdtemp(prefix="mhmoe-bench-")
    place = {"module": measurement.__module__, "function": measurement.__qualname__}
    request = json.dumps({**place, "spec": spec.model_dump_json(), "folder": folder, "number": number})
    ray = PRIVATE | {"RAY_AUTH_TOKEN": token_hex(32)}  # of a Ray of its own
    command = [sys.executable, "-m", __name__]
    try:
        done = subprocess.run(command, input=request, text=True, capture_output=True, env=os.environ | ray | more)
    finally:
        shutil.rmtree(folder)
    if done.returncode:
        raise JobError(what, first_error(done.stderr, done.returncode), "mend that and measure again")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def first_error(stderr: str, code: int) -> str:
    """Of a process that ended with this exit code, or by the signal of this number where it is negative: the first
    error of a traceback, which caused the others."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    ended = f"exit code {code}" if code >= 0 else f"it was ended by {signal.Signals(-code).name}"
    return next(iter(errors or lines[-1:]), ended)


def main() -> None:
    request = json.load(sys.stdin)
    measurement: Measurement = getattr(importlib.import_module(request["module"]), request["function"])
    spec = RunSpec.model_validate_json(request["spec"])
    print(json.dumps(measurement(spec, Path(request["folder"]), request["number"])))


if __name__ == "__main__":
    main()
