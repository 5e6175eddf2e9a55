"""The protocol of commands that run on a cluster as Ray jobs: a request, a module that answers it, a result.

A kind of job is a subclass of `RemoteJob` with the fields of its request. Its module is run on the cluster as

    python -m MODULE JOB_NAME

with the request in an environment variable, and begins with `Request.received()`. What it tells its user is a line of
its log that begins with the kind; an error of ours is a line, too (`errors.logging_errors`). Where it leaves its result
is for the kind to say: `result` finds it, by default in the log, where `RemoteJob.answer` writes it.

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
"""Environment variable that holds the packed request. Linux takes at most 128 KiB in one, and a pattern that the shell
spells out is a thousand sources, alike but for a few letters."""
RESULT = "result: "
"""Start of the log lines that hold a result."""
_PIECE = 8_000  # characters of such a line: Ray sends a log in chunks of 20,000

R = TypeVar("R")


class RemoteJob(BaseModel, Generic[R]):
    module: ClassVar[str]
    """Run on the cluster."""
    kind: ClassVar[str]
    """One word, which the job's name and its lines for the user begin with."""
    result_type: ClassVar[Any] = None
    """What `answer` writes and `result` reads."""

    @property
    def job_name(self) -> str:
        """A name that no other job has."""
        return self.unique_name()

    def unique_name(self, *words: str) -> str:
        """Return a new name of a job, which begins with the kind and some words."""
        return "-".join([self.kind, *words, secrets.token_hex(3)])

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables of its job."""
        return {VARIABLE: packed(self.model_dump_json())}

    @property
    def metadata(self) -> dict[str, str]:
        """Strings that Ray keeps with the job."""
        return {}

    @classmethod
    def received(cls) -> Self:
        """Return the request of this process, which is a job."""
        return cls.model_validate_json(unpacked(os.environ[VARIABLE]))

    @classmethod
    def answer(cls, result: R) -> None:
        """Write the result into the log, which is there on any cluster."""
        text = TypeAdapter(cls.result_type).dump_json(result, ensure_ascii=True).decode()
        for i in range(0, len(text), _PIECE):
            sys.stdout.write(f"{RESULT}{text[i : i + _PIECE]}\n")  # in one write: Ray's own lines go to the same file

    def result(self, log: Callable[[], str]) -> R | None:
        """Return what the job made; None if it made nothing.

        Args:
            log: returns all that the job has written.
        """
        pieces = [line.removeprefix(RESULT) for line in log().splitlines() if line.startswith(RESULT)]
        return TypeAdapter(self.result_type).validate_json("".join(pieces)) if pieces else None


def packed(text: str) -> str:
    """Return a text as printable characters of about a third of its size."""
    return base64.b64encode(zlib.compress(text.encode())).decode()


def unpacked(text: str) -> str:
    return zlib.decompress(base64.b64decode(text)).decode()
