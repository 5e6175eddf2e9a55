"""Remote jobs on a cluster: submit a request of `mhmoe_ray/remote.py` as a Ray job, and read its log and result."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from mhmoe_ray.cluster import jobs
from mhmoe_ray.cluster.connect import Connection
from mhmoe_ray.cluster.nodes import head_python
from mhmoe_ray.errors import JobError, logged
from mhmoe_ray.remote import RemoteJob

R = TypeVar("R")


def submission_id(job_name: str) -> str:
    """Return the submission id, which is the name that Ray gets for the remote job `job_name`.

    The id is part of URLs of Ray's jobs API, so characters other than letters, digits and - are replaced.
    """
    return re.sub("[^A-Za-z0-9-]", "-", job_name)


def job_request(
    request: RemoteJob[R], local: bool, runtime_env: Mapping[str, Any], python: str = "python"
) -> dict[str, Any]:
    """Return the request to Ray Jobs that submits a remote job; `mhmoe submit --dry-run` prints it.

    Args:
        request: the remote job, of any kind.
        local: whether this package started the cluster, as in `jobs.job_request`.
        runtime_env: Ray's runtime environment, as in the spec.
        python: the interpreter on the head node of another cluster, as in `jobs.job_request`.
    """
    job_name = submission_id(request.job_name)
    environment = {**runtime_env, "env_vars": {**runtime_env.get("env_vars", {}), **request.environment}}
    args = ["-m", request.module, job_name]
    return jobs.job_request(
        args, job_name, local=local, python=python, runtime_env=environment, metadata=request.metadata
    )


@dataclass(frozen=True)
class SubmittedJob(Generic[R]):
    """A remote job that runs on a cluster, or has run there."""

    connection: Connection
    request: RemoteJob[R]
    name: str

    def lines(self) -> Iterator[str]:
        """Yield the lines of the job's log as they arrive, until the job ends; a failed job may lack its last lines."""
        return jobs.follow_logs(self.connection, self.name)

    def progress(self) -> Iterator[str]:
        """Yield the lines of the log that are meant for the user, as they arrive, until the job ends."""
        return (line for line in self.lines() if line.startswith(f"{self.request.kind}: "))

    @property
    def is_running(self) -> bool:
        return jobs.is_alive(self.connection, self.name)

    def result(self, subject: str, fix: str = "see the job in the dashboard") -> R:
        """Return the result of a job that has ended.

        Args:
            subject: the name of the result, for the message of an error.
            fix: the remedy if the job ended without an error of its own, for example because it was killed.

        Raises:
            MhmoeError: the job failed or wrote no result. It is the last error that the job logged; without one, it is
                a JobError with Ray's message.
        """
        log = jobs.logs(self.connection, self.name)
        result = self.request.result(lambda: log)
        if result is not None and jobs.status(self.connection, self.name) == "SUCCEEDED":
            return result
        raise logged(log) or JobError(subject, jobs.message(self.connection, self.name), fix)


def submit(connection: Connection, runtime_env: Mapping[str, Any], request: RemoteJob[R]) -> SubmittedJob[R]:
    """Submit a remote job to the cluster, without waiting for it.

    Args:
        connection: the cluster.
        runtime_env: Ray's runtime environment, as in the spec.
        request: the remote job, of any kind.

    Raises:
        JobError, SpecError, ClusterError: in the same cases as `jobs.submit`.
    """
    python = "python" if connection.local else head_python(connection, runtime_env)
    submission = job_request(request, connection.local, runtime_env, python)
    jobs.submit(connection, submission)
    return SubmittedJob(connection, request, submission["submission_id"])
