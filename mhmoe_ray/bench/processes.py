"""Measurements in a process of their own, so that nothing of one, its Ray included, is left for the next."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from secrets import token_hex
from typing import Any

from mhmoe_ray.bench.timing import failure
from mhmoe_ray.cluster.spawn import PRIVATE
from mhmoe_ray.spec import RunSpec

Measurement = Callable[[RunSpec, Path, int], dict[str, Any]]
"""A function that measures a spec in an empty folder with a number of processes or threads.

It returns figures that JSON can hold.
"""


def run_apart(measurement: Measurement, spec: RunSpec, number: int, what: str, **more: str) -> dict[str, Any]:
    """Run a measurement in a process of its own, and return its figures.

    Args:
        measurement: a function at the top level of a module.
        spec: the first argument of the function.
        number: the last argument of the function, a number of processes or threads.
        what: the name of the measurement in an error.
        more: additional variables of the process's environment.

    Raises:
        JobError: the measurement failed.
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
        raise failure(what, done.stderr, done.returncode)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    request = json.load(sys.stdin)
    measurement: Measurement = getattr(importlib.import_module(request["module"]), request["function"])
    spec = RunSpec.model_validate_json(request["spec"])
    print(json.dumps(measurement(spec, Path(request["folder"]), request["number"])))


if __name__ == "__main__":
    main()
