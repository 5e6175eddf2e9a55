"""Remote jobs on a cluster: submit a request of `mhmoe_ray/remote.py` as a Ray job, and read its log and result."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from mhmoe_ray.cluster import jobs
from mhmoe_ray.cluster.connect import Connection
from mhmoe_ray.cluster.nodes import head_python
from mhmoe_ray.errors import JobError, logged
from mhmoe_ray.remote import RemoteJob
from mhmoe_ray.terminal import Activity

R = TypeVar("R")


def submission_id(job_name: str) -> str:
    """Return Ray's name for a remote job; it is part of URLs of the jobs API, so other characters become -."""
    return re.sub("[^A-Za-z0-9-]", "-", job_name)


def job_request(
    request: RemoteJob[R], local: bool, runtime_env: Mapping[str, Any], python: str = "python"
) -> dict[str, Any]:
    """Return the request to Ray Jobs that submits a remote job; `mhmoe submit --dry-run` prints it."""
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
        # Ray puts the name and the process of a task before each line that the task writes, such as an evaluation.
        lines = (re.sub(r"^(\x1b\[\d+m)?\([^()]*\bpid=\d+[^()]*\)(\x1b\[0m)? ", "", line) for line in self.lines())
        return (line for line in lines if line.startswith(f"{self.request.kind}: "))

    @property
    def is_running(self) -> bool:
        return jobs.is_alive(self.connection, self.name)

    def result(self, subject: str, fix: str = "see the job in the dashboard") -> R:
        """Return the result of a job that has ended; `subject` names it in errors.

        Without a result, raise the last error that the job logged. If it logged none, for example because it was
        killed, raise a JobError with Ray's message and the remedy `fix`.
        """
        log, job_info = jobs.logs(self.connection, self.name), jobs.info(self.connection, self.name)
        result = self.request.result(lambda: log)
        if result is not None and job_info and job_info.status == "SUCCEEDED":
            return result
        reason = job_info.message if job_info else "the cluster does not know this job"
        raise logged(log) or JobError(subject, reason, fix)


def submit(
    connection: Connection,
    runtime_env: Mapping[str, Any],
    request: RemoteJob[R],
    on_note: Callable[[str], object] = lambda line: None,
) -> SubmittedJob[R]:
    """Submit a remote job to the cluster, without waiting for it; errors are those of `jobs.submit`."""
    on_note(Activity("submitting the job" if connection.local else "packaging and submitting the job"))
    python = "python" if connection.local else head_python(connection, runtime_env)
    submission = job_request(request, connection.local, runtime_env, python)
    jobs.submit(connection, submission)
    return SubmittedJob(connection, request, submission["submission_id"])
