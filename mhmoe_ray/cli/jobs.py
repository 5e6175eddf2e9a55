"""The cluster that a command runs on, the checks before it starts there, and modules of ours that run as its jobs."""

import os
import re
import secrets
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mhmoe_ray.cli.common import STORAGE, detaching, note, say

if TYPE_CHECKING:
    from mhmoe_ray.cluster.connect import Connection
    from mhmoe_ray.errors import MhmoeError
    from mhmoe_ray.runs.directory import RunDir
    from mhmoe_ray.spec import ClusterSpec, RunSpec
    from mhmoe_ray.storage import Location


LOCAL_CPUS = 8
"""Logical CPUs that a local cluster is started with at least."""


def cluster_for(section: "ClusterSpec", needed: "Sequence[Location]", cpus: int, address: str | None) -> "Connection":
    """The cluster to run on. A local one is started where none is named, large enough to train on afterwards.

    Args:
        section: of the spec.
        needed: what its nodes read and write.
        cpus: logical CPUs that a local one must have.
        address: the one asked for.

    Raises:
        ClusterError: it cannot be reached, or the local one has fewer logical CPUs than asked for.
        SpecError: paths of this machine mean nothing there.
    """
    from mhmoe_ray.cluster.connect import connect_if_there, start
    from mhmoe_ray.errors import ClusterError, SpecError

    connection = connect_if_there(address)
    if connection is None:
        note.print("starting a Ray cluster on this machine; `mhmoe cluster down` ends it")
        connection = start(max(cpus, section.cpus, LOCAL_CPUS))
    if connection.ours and connection.ours.cpus < cpus:
        fix = "stop it with `mhmoe cluster down`; the next command starts one that is large enough"
        raise ClusterError("local cluster", f"it has {connection.ours.cpus} CPUs and {cpus} are needed", fix)
    own = next((place for place in needed if isinstance(place, Path)), None)
    if own and not connection.is_local_machine and not section.shared_filesystem:
        why = f"the nodes of {connection.address} cannot be expected to see {own} of this machine"
        fix = "put storage and data on a file system that all of them mount and set cluster.shared_filesystem"
        raise SpecError("storage", why, fix)
    return connection


def cluster_to_train(spec: "RunSpec", address: str | None) -> "Connection":
    """The cluster that a run of this spec goes to; otherwise as `cluster_for`."""
    return cluster_for(spec.cluster, [spec.storage, spec.data.prepared], spec.cluster.cpus, address)


def name_of(run: "RunDir") -> str:
    """What to call a run in a command: its id where that looks for it, else its path."""
    from mhmoe_ray.storage import location

    looked_in = location(os.environ.get("MHMOE_STORAGE", STORAGE)).absolute()
    return run.id if run.path.parent == looked_in else shlex.quote(str(run.path))


def check_can_train(spec: "RunSpec") -> None:
    """What is wrong with the data is said now, not by a job that has just started."""
    from mhmoe_ray.data.order.mixture import training_order
    from mhmoe_ray.data.shards.manifest import check_recipe, read_data_manifest
    from mhmoe_ray.data.sources import find_files

    prepared = read_data_manifest(spec.data.prepared)
    if prepared:
        check_recipe(spec.data.prepared, prepared, spec)
        training_order(spec, prepared)
    else:
        find_files(spec.data)


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
