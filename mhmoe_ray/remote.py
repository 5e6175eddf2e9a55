"""Protocol of commands that run on a cluster as Ray jobs: a request, a module that answers it, and a result.

Each kind of job is a subclass of `RemoteJob` with the fields of its request. The cluster runs `python -m MODULE
JOB_NAME` with the request in an environment variable, and the module calls `main` of its subclass. Log lines for the
user begin with the kind of job, and an `MhmoeError` becomes a log line, too (`errors.logging_errors`). The result is
written to the log, unless a subclass stores it elsewhere and overrides `result`.

`cluster/remote.py` submits a request and follows the job. This module does not need Ray.
"""

import base64
import json
import os
import secrets
import sys
import zlib
from collections.abc import Callable
from typing import Any, ClassVar, Generic, Self, TypeVar

from pydantic import BaseModel, TypeAdapter

from mhmoe_ray.errors import logging_errors

VARIABLE = "MHMOE_REQUEST"
"""Environment variable with a job's compressed request. Linux limits a variable to 128 KiB, but the thousand paths of
an expanded file pattern are similar and compress well."""
JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Environment variable in which Ray gives a job its environment and metadata, as JSON."""
LOCAL_CLUSTER = "MHMOE_CLUSTER"
"""Environment variable of the processes of a local cluster, with the cluster's folder."""
RESULT = "result: "
"""Prefix of the log lines that hold a job's result."""
_PIECE = 8_000  # Largest number of characters of a result in a line; Ray sends a log in chunks of 20,000.

R = TypeVar("R")


class RemoteJob(BaseModel, Generic[R]):
    """Request for a job on a cluster whose result has type R; each kind of job is a subclass."""

    module: ClassVar[str]
    """Python module that the cluster runs."""
    kind: ClassVar[str]
    """One word, such as `eval`, with which the job's name and its log lines for the user begin."""
    result_type: ClassVar[Any] = None
    """Type of the result that `answer` writes; None if a subclass stores its result elsewhere."""

    @property
    def job_name(self) -> str:
        """Name of the job; by default each access returns a new and unique one."""
        return self.unique_name()

    def unique_name(self, *words: str) -> str:
        """Return a new job name: the kind, `words` and a random suffix."""
        return "-".join([self.kind, *words, secrets.token_hex(3)])

    @property
    def environment(self) -> dict[str, str]:
        return {VARIABLE: packed(self.model_dump_json())}

    @property
    def metadata(self) -> dict[str, str]:
        """Strings that Ray keeps with the job; by default none."""
        return {}

    @classmethod
    def main(cls) -> None:
        """Answer the request that this process, the job, was submitted with; log errors for the user."""
        request = cls.received()
        init_ray()
        with logging_errors():
            request.execute()

    def execute(self) -> None:
        """Do the work of the job, after `ray.init`."""
        raise NotImplementedError

    @classmethod
    def print_line(cls, line: str) -> None:
        """Write a line for the user to the job's log."""
        print(f"{cls.kind}: {line}", flush=True)

    @classmethod
    def received(cls) -> Self:
        """Return the request that this process was submitted with."""
        # Ray gives the job's environment to its workers, too, and starts a process twice if it has one. Workers do not
        # need the request, so it is removed from what Ray's driver will read.
        if config_text := os.environ.get(JOB_CONFIG):
            config = json.loads(config_text)
            config["runtime_env"].get("env_vars", {}).pop(VARIABLE, None)
            os.environ[JOB_CONFIG] = json.dumps(config)
        return cls.model_validate_json(unpacked(os.environ[VARIABLE]))

    @classmethod
    def answer(cls, result: R) -> None:
        """Write the job's result to its log, where `result` reads it."""
        text = TypeAdapter(cls.result_type).dump_json(result, ensure_ascii=True).decode()
        for i in range(0, len(text), _PIECE):
            # Each line is a single write, because Ray writes its own lines to the same file and could otherwise write
            # in between.
            sys.stdout.write(f"{RESULT}{text[i : i + _PIECE]}\n")

    def result(self, log: Callable[[], str]) -> R | None:
        """Return the result in the job's log, which `log` fetches; None if `answer` wrote none."""
        pieces = [line.removeprefix(RESULT) for line in log().splitlines() if line.startswith(RESULT)]
        return TypeAdapter(self.result_type).validate_json("".join(pieces)) if pieces else None


def init_ray() -> None:
    """Connect this process, a job, to Ray."""
    import ray

    # Without an address, some actors of Ray connect to the only cluster on their machine. A machine may run several
    # clusters, so all processes of the job get the address of the job's cluster. Those of a local cluster have it.
    address = {} if LOCAL_CLUSTER in os.environ else {"RAY_ADDRESS": os.environ["RAY_ADDRESS"]}
    ray.init(runtime_env={"env_vars": address})


def packed(text: str) -> str:
    """Compress a text to printable characters (zlib and Base64)."""
    return base64.b64encode(zlib.compress(text.encode())).decode()


def unpacked(text: str) -> str:
    """Restore a text that `packed` compressed."""
    return zlib.decompress(base64.b64decode(text)).decode()
