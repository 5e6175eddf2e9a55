"""The command line, run as a process."""

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from tests.forked import FORKED, take_over


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
    """Run `mhmoe args` in a folder, without a terminal and 100 columns wide."""
    with TemporaryDirectory() as told:
        out, err = Path(told) / "out", Path(told) / "err"
        process = FORKED.Process(target=_run, args=(folder, args, _environment(env), out, err))
        process.start()
        try:
            process.join()
        finally:
            process.kill()  # where a test is ended meanwhile: it would outlive the test, and this process wait for it
        return Result(process.exitcode, out.read_text(), err.read_text())


def _run(folder: Path, args: tuple[str, ...], environment: dict[str, str], out: Path, err: Path) -> None:
    take_over(environment)
    os.chdir(folder)
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.argv = ["mhmoe", *args]
    from mhmoe_ray.cli.app import main  # which asks for the environment

    try:
        main()
    except Exception:  # as an interpreter shows it, and not multiprocessing
        traceback.print_exc()
        sys.exit(1)


def mhmoe_anew(folder: Path, *args: str, **env: str) -> Result:
    """Run `mhmoe args` as `mhmoe` does, but in an interpreter of its own.

    This is for settings that are read from the environment at an import, and for commands that start processes with
    multiprocessing.
    """
    done = subprocess.run(command(*args), cwd=folder, capture_output=True, text=True, env=_environment(env))
    return Result(done.returncode, done.stdout, done.stderr)


def _environment(env: dict[str, str]) -> dict[str, str]:
    return {**os.environ, "COLUMNS": "100", **env}


def assert_one_line(result: Result, code: int, *parts: str) -> None:
    """Assert that an error is as users must see it: this exit code, one last line that holds these parts, no
    traceback."""
    assert result.code == code, result
    *progress, last = result.err.splitlines()
    assert last.startswith("error: ")
    assert all(
        line.startswith(("prepare: ", "inspect: ", "starting ", "exporting ", "importing ")) for line in progress
    )
    assert "Traceback" not in result.out + result.err
    for part in parts:
        assert part in last
