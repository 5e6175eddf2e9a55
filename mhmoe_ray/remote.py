"""The protocol of commands that run on a cluster as Ray jobs: a request, a module that answers it, and a result.

A kind of job is a subclass of `RemoteJob` that has the fields of its request. Its module is run on the cluster as

    python -m MODULE JOB_NAME

with the request in an environment variable, and begins with `Request.received()`. The lines of its log that are meant
for the user begin with the kind; an `MhmoeError` is a line of the log too (`errors.logging_errors`). Each kind decides
where it leaves its result, and its method `result` reads it from there: by default from the log, into which
`RemoteJob.answer` writes it.

`cluster/remote.py` submits a request and follows the job. Nothing here needs Ray.
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
"""Environment variable that holds the packed request.

Linux limits one variable to 128 KiB. A file pattern that the shell expands can become a thousand sources; they differ
in a few letters only and therefore compress well.
"""
RESULT = "result: "
"""Start of the log lines that hold a result."""
_PIECE = 8_000  # Most characters of a result per line, well below the chunks of 20,000 in which Ray sends a log.

R = TypeVar("R")


class RemoteJob(BaseModel, Generic[R]):
    """Request for a job on a cluster. Each kind of job is a subclass, with fields for the request; R is its result."""

    module: ClassVar[str]
    """Name of the module that is run on the cluster."""
    kind: ClassVar[str]
    """One word with which the job's name and its log lines for the user begin."""
    result_type: ClassVar[Any] = None
    """Type of the result that `answer` writes and `result` reads."""

    @property
    def job_name(self) -> str:
        """Name of the job in Ray: by default a new one at each access, which no other job has."""
        return self.unique_name()

    def unique_name(self, *words: str) -> str:
        """Return a new job name that begins with the kind and the given words and ends with a random suffix."""
        return "-".join([self.kind, *words, secrets.token_hex(3)])

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables of the job: the packed request."""
        return {VARIABLE: packed(self.model_dump_json())}

    @property
    def metadata(self) -> dict[str, str]:
        """Strings to submit with the job, which Ray keeps with it; by default none."""
        return {}

    @classmethod
    def received(cls) -> Self:
        """Return the request of the current process, which is the job."""
        return cls.model_validate_json(unpacked(os.environ[VARIABLE]))

    @classmethod
    def answer(cls, result: R) -> None:
        """Write the result of the current process, which is the job, to its log; `result` reads it there."""
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
    """Compress a text, and return it in printable characters (Base64); `unpacked` restores it."""
    return base64.b64encode(zlib.compress(text.encode())).decode()


def unpacked(text: str) -> str:
    """Return the text that `packed` compressed."""
    return zlib.decompress(base64.b64decode(text)).decode()
