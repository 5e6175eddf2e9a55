"""Requests of `mhmoe_ray/remote.py` as jobs of a cluster: submit one, follow it, take its result."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from mhmoe_ray.cluster import jobs
from mhmoe_ray.cluster.connect import Connection
from mhmoe_ray.cluster.nodes import head_python
from mhmoe_ray.errors import JobError, MhmoeError, logged
from mhmoe_ray.remote import RemoteJob

R = TypeVar("R")


def job_request(
    request: RemoteJob[R], local: bool, runtime_env: Mapping[str, Any], python: str = "python"
) -> dict[str, Any]:
    """Return what Ray Jobs is asked for; `submit --dry-run` prints it.

    Args:
        request: of any kind.
        local: as `jobs.request` takes it.
        runtime_env: Ray's runtime environment, as the spec has it.
        python: as `jobs.request` takes it.
    """
    job_name = re.sub("[^A-Za-z0-9-]", "-", request.job_name)  # it stands in URLs
    environment = {**runtime_env, "env_vars": {**runtime_env.get("env_vars", {}), **request.environment}}
    args = ["-m", request.module, job_name]
    return jobs.request(args, job_name, local=local, python=python, runtime_env=environment, metadata=request.metadata)


@dataclass(frozen=True)
class SubmittedJob(Generic[R]):
    connection: Connection
    request: RemoteJob[R]
    name: str

    def lines(self) -> Iterator[str]:
        """Yield the lines of its log as they come, to its end; the last ones of a job that fails may be missing."""
        return jobs.follow_logs(self.connection, self.name)

    def progress(self) -> Iterator[str]:
        """Yield its lines for the user, to its end."""
        return (line for line in self.lines() if line.startswith(f"{self.request.kind}: "))

    @property
    def is_running(self) -> bool:
        return jobs.is_alive(self.connection, self.name)

    def result(self, what: str) -> R:
        """Return what it made, when it has ended.

        Args:
            what: the result in words, for an error.

        Raises:
            MhmoeError: the last error that the job wrote; without one, a JobError with Ray's remark on it.
        """
        log = jobs.logs(self.connection, self.name)
        made = self.request.result(lambda: log)
        if made is not None and jobs.status(self.connection, self.name) == "SUCCEEDED":
            return made
        raise self._error(what, log)

    def _error(self, what: str, log: str) -> MhmoeError:
        if error := logged(log):
            return error
        return JobError(what, jobs.message(self.connection, self.name), "see the job in the dashboard")


def submit(connection: Connection, runtime_env: Mapping[str, Any], request: RemoteJob[R]) -> SubmittedJob[R]:
    """Hand a request to the cluster.

    Args:
        connection: to the cluster.
        runtime_env: as the spec has it.
        request: of any kind.

    Raises:
        JobError, SpecError, ClusterError: as `jobs.submit`.
    """
    python = "python" if connection.local else head_python(connection, runtime_env)
    asked = job_request(request, connection.local, runtime_env, python)
    jobs.submit(connection, asked)
    return SubmittedJob(connection, request, asked["submission_id"])
