"""The command line as a process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple


class Result(NamedTuple):
    code: int
    out: str
    err: str

    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "mhmoe_ray.cli.app", *args]


def mhmoe(folder: Path, *args: str, **env: str) -> Result:
    """Run `mhmoe args` in a folder; without a terminal, 100 columns wide."""
    done = subprocess.run(
        command(*args), cwd=folder, capture_output=True, text=True, env={**os.environ, "COLUMNS": "100", **env}
    )
    return Result(done.returncode, done.stdout, done.stderr)


def assert_one_line(result: Result, code: int, *parts: str) -> None:
    """An error as users must see it: this exit code, one last line that holds these parts, no traceback."""
    assert result.code == code, result
    *progress, last = result.err.splitlines()
    assert last.startswith("error: ")
    assert all(
        line.startswith(("prepare: ", "inspect: ", "starting ", "exporting ", "importing ")) for line in progress
    )
    assert "Traceback" not in result.out + result.err
    for part in parts:
        assert part in last
