"""Functions that run `mhmoe` commands as processes."""

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from tests.support.forked import FORKED, replace_environment


class Result(NamedTuple):
    """The exit code, the standard output and the standard error of a command that has ended."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """Assert that the command succeeded, and return its standard output parsed as JSON."""
        assert self.code == 0, self.err
        return json.loads(self.out)


def command(*args: str) -> list[str]:
    """Return the words of the command line that runs `mhmoe args` in a new interpreter."""
    return [sys.executable, "-m", "mhmoe_ray.cli.app", *args]


def mhmoe(folder: Path, *args: str, **env: str) -> Result:
    """Run `mhmoe args` in `folder` and wait for its end.

    The command runs in a forked process that has imported the large modules already. It has no terminal; its output is
    100 columns wide. `env` adds environment variables to those of this process.
    """
    with TemporaryDirectory() as output_folder:
        out, err = Path(output_folder) / "out", Path(output_folder) / "err"
        process = FORKED.Process(target=_run, args=(folder, args, _environment(env), out, err))
        process.start()
        try:
            process.join()
        finally:
            # If a test is interrupted, the process must not outlive it: this interpreter would wait for the end of the
            # process.
            process.kill()
        return Result(process.exitcode, out.read_text(), err.read_text())


def _run(folder: Path, args: tuple[str, ...], environment: dict[str, str], out: Path, err: Path) -> None:
    """Run a command in this forked process, with its output in two files."""
    replace_environment(environment)
    os.chdir(folder)
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.argv = ["mhmoe", *args]
    # This import must come after `replace_environment`, because the module reads environment variables when it is
    # imported.
    from mhmoe_ray.cli.app import main

    try:
        main()
    # Print the traceback as an interpreter does, because multiprocessing would print it in another form.
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def mhmoe_subprocess(folder: Path, *args: str, **env: str) -> Result:
    """Run `mhmoe args` like the function `mhmoe`, but in a new interpreter, which takes longer.

    Some commands need it: those with environment variables that libraries read when they are imported, and those that
    start processes with multiprocessing.
    """
    process = subprocess.run(command(*args), cwd=folder, capture_output=True, text=True, env=_environment(env))
    return Result(process.returncode, process.stdout, process.stderr)


def _environment(env: dict[str, str]) -> dict[str, str]:
    return {**os.environ, "COLUMNS": "100", **env}


def assert_one_line(result: Result, code: int, *parts: str) -> None:
    """Assert that a command failed with a one-line error message at the end, without a traceback.

    Before that line, standard error may have lines of progress.

    Args:
        result: result of the command.
        code: the expected exit code.
        parts: texts that the line must contain.
    """
    assert result.code == code, result
    *progress, last_line = result.err.splitlines()
    assert last_line.startswith("error: ")
    assert all(
        line.startswith(
            (
                *("preparing data: ", "eval: ", "inspect: ", "generate: ", "starting ", "exporting ", "importing "),
                "still following, but ",
            )
        )
        for line in progress
    )
    assert "Traceback" not in result.out + result.err
    for part in parts:
        assert part in last_line
