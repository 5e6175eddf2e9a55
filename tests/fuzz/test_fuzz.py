"""Every damaged file gives one line and a documented exit code, in bounded time and memory."""

import subprocess
import sys

import pytest

MUTANTS = 50
"""Number of mutants of each kind, fewer of those that take long; `make explore` tries more, with new seeds."""


@pytest.mark.long
def test_mutants_of_all_kinds_are_refused_in_one_line_or_accepted() -> None:
    # A new process has no threads, so its forks cannot inherit a lock of a thread of this one.
    process = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "--mutants", str(MUTANTS)], capture_output=True, text=True
    )

    assert process.returncode == 0, process.stdout + process.stderr
