"""Everything a user can get wrong, or a cluster can do to them, as one tree of exceptions.

    MhmoeError
    ├── SpecError          exit 3   a spec file or an override is wrong
    ├── DataError          exit 4   text, shards or a tokenizer are missing or damaged
    ├── ClusterError       exit 5   Ray cannot be started or reached
    │   └── TokenError     exit 6   Ray was reached and refused the token
    ├── RunError           exit 7   there is no such run, or its state forbids the request
    │   └── StorageError   exit 7   what runs lie on is full, read-only or out of reach
    ├── CheckpointError    exit 8   no checkpoint, none that is whole, or one that cannot be exported or imported
    ├── JobError           exit 9   a job ran and failed
    └── ServeError         exit 10  a deployment failed

`mhmoe doctor` ends with 11 where it found an error. Exit code 2 is the command line's own (unknown option), 1 an error
of ours. Errors that are not in this tree are bugs and keep their traceback.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

DOCTOR_EXIT_CODE = 11


class MhmoeError(Exception):
    """One line for the user: what happened, why, and what to do.

    Args:
        what: the thing that failed, with its name ("spec jobs/a.yaml").
        why: the reason, as a clause.
        fix: what the user can do next, as a clause.
    """

    exit_code = 1

    def __init__(self, what: str, why: str, fix: str) -> None:
        super().__init__(what, why, fix)
        self.what, self.why, self.fix = what, why, fix

    def __str__(self) -> str:
        return " ".join(f"{self.what}: {self.why}; {self.fix}".split())

    def log(self) -> None:
        """Print the line in a job's log, where `logged` finds it."""
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


@contextmanager
def logging_errors() -> Iterator[None]:
    """Around all that a job does: an error of ours is a line of its log, and its exit code that of the kind."""
    try:
        yield
    except MhmoeError as e:
        e.log()
        sys.exit(e.exit_code)


def logged(log: str) -> MhmoeError | None:
    """The last error in a job's log, of its own kind."""
    found = re.findall(r"^error (\d+): (.*?): (.*); (.*)$", log, re.MULTILINE)
    if not found:
        return None
    code, *parts = found[-1]
    return next(kind for kind in _KINDS if kind.exit_code == int(code))(*parts)
