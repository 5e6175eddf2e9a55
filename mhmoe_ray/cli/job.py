"""A module of ours that runs as a job of the cluster."""

import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mhmoe_ray.cli.common import detaching, say

if TYPE_CHECKING:
    from mhmoe_ray.cluster.connect import Connection
    from mhmoe_ray.errors import MhmoeError
    from mhmoe_ray.spec import ClusterSpec


@dataclass(frozen=True)
class Job:
    connection: "Connection"
    name: str

    @classmethod
    def start(
        cls, connection: "Connection", section: "ClusterSpec", module: str, name: str, env: Mapping[str, str]
    ) -> "Job":
        """Args:
        connection: of the cluster.
        section: whose runtime environment the job gets.
        module: it runs.
        name: it begins with on the cluster, where it stands in URLs: all but letters, digits and - become -.
        env: environment variables of its own.
        """
        from mhmoe_ray.cluster import jobs

        job = cls(connection, f"{re.sub('[^A-Za-z0-9-]', '-', name)}-{secrets.token_hex(3)}")
        environment = dict(section.runtime_env)
        environment["env_vars"] = {**environment.get("env_vars", {}), **env}
        jobs.submit(connection, jobs.request(["-m", module], job.name, local=connection.local, runtime_env=environment))
        return job

    def detaching(self) -> AbstractContextManager[None]:
        """In it Ctrl-C ends the command and says that the job goes on."""
        return detaching(f"job {self.name} goes on; see it in the dashboard, {self.connection.address}")

    def lines(self) -> Iterator[str]:
        """Its log's, as they come, to its end; the last ones of a job that fails may be missing."""
        from mhmoe_ray.cluster import jobs

        return jobs.follow_logs(self.connection, self.name)

    def say(self, prefix: str) -> None:
        """Its lines that begin so, to its end."""
        with self.detaching():
            for line in self.lines():
                if line.startswith(prefix):
                    say(line)

    @property
    def is_running(self) -> bool:
        from mhmoe_ray.cluster import jobs

        return jobs.is_alive(self.connection, self.name)

    @property
    def has_succeeded(self) -> bool:
        from mhmoe_ray.cluster import jobs

        return jobs.status(self.connection, self.name) == "SUCCEEDED"

    @property
    def log(self) -> str:
        """All of it."""
        from mhmoe_ray.cluster import jobs

        return jobs.logs(self.connection, self.name)

    def error(self, what: str) -> "MhmoeError":
        """Its own last error; without one, Ray's remark on it, said of `what`."""
        from mhmoe_ray.cluster import jobs
        from mhmoe_ray.errors import JobError, logged

        if error := logged(self.log):
            return error
        return JobError(what, jobs.message(self.connection, self.name), "see the job in the dashboard")
