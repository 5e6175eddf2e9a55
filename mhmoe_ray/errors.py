"""Exceptions for mistakes of the user and for failures of the cluster or its storage, each with an exit code.

    MhmoeError
    ├── SpecError          exit 3   a spec file or an override is wrong
    ├── DataError          exit 4   text, shards or a tokenizer are missing or damaged
    ├── ClusterError       exit 5   Ray cannot be started or reached
    │   └── TokenError     exit 6   Ray was reached and refused the token
    ├── RunError           exit 7   there is no such run, or its state forbids the request
    │   └── StorageError   exit 7   the storage that holds runs is full, read-only or out of reach
    ├── CheckpointError    exit 8   there is no checkpoint, no complete one, or it cannot be exported or imported
    ├── JobError           exit 9   a job ran and failed
    └── ServeError         exit 10  a deployment failed

`mhmoe doctor` exits with 11 if it found an error. Exit code 2 comes from the command-line parser (an unknown option,
for example). Any other exception is a bug of this project: the user sees its traceback, and the exit code is 1.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from mhmoe_ray.terminal import printable

DOCTOR_EXIT_CODE = 11
WORD_LENGTH, PART_LENGTH = 200, 1000
"""Largest numbers of characters of a word other than a path, and of each part of a message."""


def _shorten(part: str) -> str:
    """Return a part of a message in one line, in which very long values are cut."""
    words = (word if len(word) <= WORD_LENGTH or "/" in word else f"{word[:WORD_LENGTH]}..." for word in part.split())
    line = " ".join(words)
    return line if len(line) <= PART_LENGTH else f"{line[:PART_LENGTH]}..."


class MhmoeError(Exception):
    """An error that is shown to the user as one line: what happened, why, and what to do.

    Args:
        subject: the kind and the name of what failed, such as "spec jobs/a.yaml".
        reason: the reason, as a clause.
        fix: the next step for the user, as a clause.
    """

    exit_code = 1

    def __init__(self, subject: str, reason: str, fix: str) -> None:
        super().__init__(subject, reason, fix)
        self.subject, self.reason, self.fix = subject, reason, fix

    def __str__(self) -> str:
        parts = (_shorten(part) for part in (self.subject, self.reason, self.fix))
        return printable("{}: {}; {}".format(*parts))

    def log(self) -> None:
        """Print the error as one line of the job's log, in the form that `logged` parses."""
        print(f"error {self.exit_code}: {self}", flush=True)


class SpecError(MhmoeError):
    exit_code = 3


class DataError(MhmoeError):
    exit_code = 4


class ClusterError(MhmoeError):
    exit_code = 5


class TokenError(ClusterError):
    exit_code = 6


class RunError(MhmoeError):
    exit_code = 7


class StorageError(RunError):
    pass


class CheckpointError(MhmoeError):
    exit_code = 8


class JobError(MhmoeError):
    exit_code = 9


class ServeError(MhmoeError):
    exit_code = 10


_KINDS = (SpecError, DataError, ClusterError, TokenError, RunError, CheckpointError, JobError, ServeError)


def task_error(error: Exception) -> Exception:
    """Return the error that a Ray task raised, without the wrappers of Ray; any other error is returned as it is."""
    from ray.exceptions import RayTaskError

    # A task may have waited for another task, so that its error has the other task's error as its cause.
    while isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
        error = error.cause
    return error


@contextmanager
def logging_errors() -> Iterator[None]:
    """Context manager for the work of a job: print an `MhmoeError` as one line, and exit with its exit code."""
    try:
        yield
    except Exception as e:
        error = task_error(e)
        if not isinstance(error, MhmoeError):
            raise
        error.log()
        sys.exit(error.exit_code)


def logged(log: str) -> MhmoeError | None:
    """Return the last error that `MhmoeError.log` wrote to a job's log; None if there is none.

    The exit code determines the class: code 7 gives a RunError, even if the job raised a StorageError, and a code of no
    class, which comes from the user's own code, an MhmoeError.
    """
    matches = re.findall(r"^error (\d+): (.*?): (.*); (.*)$", log, re.MULTILINE)
    if not matches:
        return None
    code, *parts = matches[-1]
    return next((kind for kind in _KINDS if kind.exit_code == int(code)), MhmoeError)(*parts)
