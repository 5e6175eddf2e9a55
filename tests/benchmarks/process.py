"""Functions that run benchmarks as processes."""

import os
import subprocess
import sys
from pathlib import Path

from tests.cli.run import Result

ROOT = Path(__file__).parents[2]


def command(*args: str) -> list[str]:
    """Return the words of the command line that runs `python -m tests.benchmarks args`."""
    return [sys.executable, "-m", "tests.benchmarks", *args]


def run_benchmark(folder: Path, *args: str) -> Result:
    """Run a benchmark in `folder` and wait for its end."""
    # Outside the project's folder, Python finds the folder `tests` only by this variable.
    python_path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"COLUMNS": "100", "PYTHONPATH": python_path}
    process = subprocess.run(command(*args), cwd=folder, capture_output=True, text=True, env=environment)
    return Result(process.returncode, process.stdout, process.stderr)
