"""Functions that run the command line as a process."""

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
    """The exit code and the output of a command."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """Return the parsed output of a command that succeeded."""
        assert self.code == 0, self.err
        return json.loads(self.out)


def command(*args: str) -> list[str]:
    """Return the command line of `mhmoe args` in an interpreter of its own."""
    return [sys.executable, "-m", "mhmoe_ray.cli.app", *args]


def mhmoe(folder: Path, *args: str, **env: str) -> Result:
    """Run `mhmoe args` in a folder, without a terminal and 100 columns wide."""
    with TemporaryDirectory() as output_folder:
        out, err = Path(output_folder) / "out", Path(output_folder) / "err"
        process = FORKED.Process(target=_run, args=(folder, args, _environment(env), out, err))
        process.start()
        try:
            process.join()
        finally:
            # If a test is interrupted, the process would outlive it, and this interpreter would wait for its end.
            process.kill()
        return Result(process.exitcode, out.read_text(), err.read_text())


def _run(folder: Path, args: tuple[str, ...], environment: dict[str, str], out: Path, err: Path) -> None:
    take_over(environment)
    os.chdir(folder)
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.argv = ["mhmoe", *args]
    # The import reads environment variables, and therefore comes after `take_over`.
    from mhmoe_ray.cli.app import main

    try:
        main()
    # The traceback should look as in an interpreter; multiprocessing would print it in its own form.
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def mhmoe_subprocess(folder: Path, *args: str, **env: str) -> Result:
    """Run `mhmoe args` as `mhmoe` does, but in a new interpreter.

    It is for settings that libraries read from the environment at import, and for commands that start processes with
    multiprocessing.
    """
    process = subprocess.run(command(*args), cwd=folder, capture_output=True, text=True, env=_environment(env))
    return Result(process.returncode, process.stdout, process.stderr)


def _environment(env: dict[str, str]) -> dict[str, str]:
    return {**os.environ, "COLUMNS": "100", **env}


def assert_one_line(result: Result, code: int, *parts: str) -> None:
    """Assert that a command failed as users should see it: with an error in one line and without a traceback.

    Args:
        result: result of the command.
        code: the expected exit code.
        parts: texts that the line must contain.
    """
    assert result.code == code, result
    *progress, last_line = result.err.splitlines()
    assert last_line.startswith("error: ")
    assert all(
        line.startswith(("prepare: ", "inspect: ", "starting ", "exporting ", "importing ")) for line in progress
    )
    assert "Traceback" not in result.out + result.err
    for part in parts:
        assert part in last_line
