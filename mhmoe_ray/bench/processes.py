"""Measurements in processes of their own, so that no remains of one, such as its Ray cluster, affect the next one."""

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

from mhmoe_ray.bench.timing import process_failure
from mhmoe_ray.cluster.spawn import PRIVATE
from mhmoe_ray.spec import RunSpec

Measurement = Callable[[RunSpec, Path, int], dict[str, Any]]
"""Function (spec, empty folder, number of processes or threads) that returns results that JSON can represent."""


def run_in_process(
    measurement: Measurement, spec: RunSpec, number: int, title: str, **variables: str
) -> dict[str, Any]:
    """Run a measurement in a process of its own with an empty temporary folder; if it fails, raise a JobError.

    `measurement` is a function at the top level of a module. `variables` are added to the process's environment.
    """
    folder = tempfile.mkdtemp(prefix="mhmoe-bench-")
    function_name = {"module": measurement.__module__, "function": measurement.__qualname__}
    request = json.dumps({**function_name, "spec": spec.model_dump_json(), "folder": folder, "number": number})
    # The measurement starts a Ray cluster of its own. With these variables, only this machine can reach the cluster,
    # and only with this token.
    ray_variables = PRIVATE | {"RAY_AUTH_TOKEN": token_hex(32)}
    command = [sys.executable, "-m", __name__]
    try:
        process = subprocess.run(
            command, input=request, text=True, capture_output=True, env=os.environ | ray_variables | variables
        )
    finally:
        shutil.rmtree(folder)
    if process.returncode:
        raise process_failure(title, process.stderr, process.returncode)
    # Libraries may print to stdout before the measurement prints its result, so the result is the last line.
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Run the measurement that the JSON on stdin names, and print its results as JSON."""
    request = json.load(sys.stdin)
    measurement: Measurement = getattr(importlib.import_module(request["module"]), request["function"])
    spec = RunSpec.model_validate_json(request["spec"])
    print(json.dumps(measurement(spec, Path(request["folder"]), request["number"])))


if __name__ == "__main__":
    main()
