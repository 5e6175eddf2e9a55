"""Running a module of ours as a job of the cluster and following it to its end."""

import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING

from mhmoe_ray.cli.common import note

if TYPE_CHECKING:
    from mhmoe_ray.cluster.connect import Connection
    from mhmoe_ray.errors import DataError
    from mhmoe_ray.spec import ClusterSpec


class Ended:
    """A job that is over, well or not."""

    def __init__(self, connection: "Connection", name: str) -> None:
        from mhmoe_ray.cluster import jobs

        self._connection, self._name = connection, name
        self.log = jobs.logs(connection, name)
        """The whole one: a stream of it may end before the last lines of a job that fails."""

    def error(self, what: str) -> "DataError":
        """The job's own last error; without one, Ray's remark on the job, said of `what`."""
        from mhmoe_ray.cluster import jobs
        from mhmoe_ray.errors import DataError

        told = [line.removeprefix("error: ") for line in self.log.splitlines() if line.startswith("error: ")]
        if told:
            return DataError.parse(told[-1])
        return DataError(what, jobs.message(self._connection, self._name), "see the job in the dashboard")


def run(
    connection: "Connection", section: "ClusterSpec", module: str, name: str, env: Mapping[str, str], says: str
) -> Ended:
    """Args:
    connection: of the cluster.
    section: whose runtime environment the job gets.
    module: it runs.
    name: it begins with on the cluster.
    env: environment variables of its own.
    says: begins the lines of its log that are shown as they come.
    """
    from mhmoe_ray.cluster import jobs

    job = f"{name}-{secrets.token_hex(3)}"
    environment = dict(section.runtime_env)
    environment["env_vars"] = {**environment.get("env_vars", {}), **env}
    jobs.submit(connection, jobs.request(["-m", module], job, local=connection.local, runtime_env=environment))
    for line in jobs.follow_logs(connection, job):
        if line.startswith(says):
            note.print(line, soft_wrap=True)
    return Ended(connection, job)
