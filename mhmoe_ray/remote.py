"""The protocol of commands that run on a cluster as Ray jobs: a request, a module that answers it, and a result.

Each kind of job is a subclass of `RemoteJob`, with the fields of its request. The cluster runs its module as

    python -m MODULE JOB_NAME

with the request in an environment variable, which the module reads first with `Request.received()`. The job writes to a
log. Log lines for the user begin with the kind of job, and an `MhmoeError` becomes a line of the log, too
(`errors.logging_errors`). Each kind of job decides where to store its result, and its method `result` reads the result
from there. By default `RemoteJob.answer` writes it to the log.

`cluster/remote.py` submits a request and follows the job. This module does not need Ray.
"""

import base64
import os
import secrets
import sys
import zlib
from collections.abc import Callable
from typing import Any, ClassVar, Generic, Self, TypeVar

from pydantic import BaseModel, TypeAdapter

VARIABLE = "MHMOE_REQUEST"
"""Name of the environment variable that holds the compressed request of a job.

Linux limits one variable to 128 KiB. A request may list a thousand paths, if the shell has expanded a file pattern.
Such paths differ in a few letters only and therefore compress well.
"""
RESULT = "result: "
"""Prefix of the log lines that hold a job's result."""
_PIECE = 8_000  # Largest number of characters of a result in a line; Ray sends a log in chunks of 20,000.

R = TypeVar("R")


class RemoteJob(BaseModel, Generic[R]):
    """Request for a job on a cluster. Each kind of job is a subclass, with fields for the request.

    R is the type of the job's result.
    """

    module: ClassVar[str]
    """Name of the Python module that the cluster runs."""
    kind: ClassVar[str]
    """One word for the kind of job, such as `eval`; the job's name and its log lines for the user begin with it."""
    result_type: ClassVar[Any] = None
    """Type of the result that `answer` writes and `result` reads; None if a subclass stores its result elsewhere."""

    @property
    def job_name(self) -> str:
        """Name of the job; by default each access returns a new and unique one."""
        return self.unique_name()

    def unique_name(self, *words: str) -> str:
        """Return a new job name that begins with the kind and the given words and ends with a random suffix."""
        return "-".join([self.kind, *words, secrets.token_hex(3)])

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables of the job, which hold its compressed request."""
        return {VARIABLE: packed(self.model_dump_json())}

    @property
    def metadata(self) -> dict[str, str]:
        """Strings to submit with the job, which Ray keeps with it; by default none."""
        return {}

    @classmethod
    def received(cls) -> Self:
        """Return the request that this process, the job, was submitted with."""
        return cls.model_validate_json(unpacked(os.environ[VARIABLE]))

    @classmethod
    def answer(cls, result: R) -> None:
        """Write the job's result to its log, from within the job; the method `result` reads it there."""
        text = TypeAdapter(cls.result_type).dump_json(result, ensure_ascii=True).decode()
        for i in range(0, len(text), _PIECE):
            # Each line is a single write, because Ray writes its own lines to the same file and could otherwise write
            # in between.
            sys.stdout.write(f"{RESULT}{text[i : i + _PIECE]}\n")

    def result(self, log: Callable[[], str]) -> R | None:
        """Return the result that the job wrote to its log with `answer`; None if it wrote none.

        Args:
            log: function that returns the whole log of the job.
        """
        pieces = [line.removeprefix(RESULT) for line in log().splitlines() if line.startswith(RESULT)]
        return TypeAdapter(self.result_type).validate_json("".join(pieces)) if pieces else None


def packed(text: str) -> str:
    """Compress a text to printable characters (zlib and Base64); `unpacked` restores it."""
    return base64.b64encode(zlib.compress(text.encode())).decode()


def unpacked(text: str) -> str:
    """Return the original text of a string that `packed` compressed."""
    return zlib.decompress(base64.b64decode(text)).decode()
