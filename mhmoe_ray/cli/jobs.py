"""The cluster that a command runs on, the checks before it starts there, and following its jobs."""

import os
import shlex
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mhmoe_ray.cli.common import STORAGE, detaching, note, say

if TYPE_CHECKING:
    from mhmoe_ray.cluster.connect import Connection
    from mhmoe_ray.cluster.remote import SubmittedJob
    from mhmoe_ray.planner.placement import Node
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
    """The cluster that a run of this spec goes to; otherwise as `cluster_for`.

    Raises:
        ClusterError: also where the cluster can never hold the run's workers.
    """
    check_gpus_of_this_machine(spec, address)
    connection = cluster_for(spec.cluster, [spec.storage, spec.data.prepared], spec.cluster.cpus, address)
    check_room(spec, connection)
    return connection


def check_gpus_of_this_machine(spec: "RunSpec", address: str | None) -> None:
    """Refuse a run with GPUs before a local cluster is started for it, on a machine that has none.

    Raises:
        ClusterError: a local cluster would be started, and can never hold the run.
    """
    from mhmoe_ray.cluster.connect import connect_if_there
    from mhmoe_ray.cluster.nodes import gpus_of_this_machine
    from mhmoe_ray.planner.placement import Node

    if spec.cluster.gpus_per_worker and connect_if_there(address) is None:
        here = Node("this machine", max(spec.cluster.cpus, LOCAL_CPUS), gpus_of_this_machine())
        _check_room(spec, [here], "local cluster")


def check_room(spec: "RunSpec", connection: "Connection") -> None:
    """Refuse a run that its cluster can never hold; of one that may grow, say what the run will wait for.

    Raises:
        ClusterError: a cluster that does not grow lacks nodes, CPUs or GPUs.
    """
    from mhmoe_ray.cluster.nodes import whole_nodes
    from mhmoe_ray.errors import ClusterError

    try:
        _check_room(spec, whole_nodes(connection), f"cluster {connection.address}")
    except ClusterError as e:
        if connection.local:
            raise
        note.print(f"warning: {e.why}; the run waits until nodes join, and `mhmoe status` shows it", soft_wrap=True)


def _check_room(spec: "RunSpec", nodes: "list[Node]", name: str) -> None:
    from mhmoe_ray.errors import ClusterError
    from mhmoe_ray.planner.placement import missing_room

    cluster = spec.cluster
    missing = missing_room(nodes, cluster.cpus_per_worker, cluster.gpus_per_worker, spec.worker_counts[0])
    if missing:
        gpus = "set cluster.gpus_per_worker to 0, or " if cluster.gpus_per_worker else "lower cluster.workers, or "
        raise ClusterError(name, missing, f"{gpus}name a larger cluster with --address")


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


def detaching_from(job: "SubmittedJob[Any]") -> AbstractContextManager[None]:
    """In it Ctrl-C ends the command and says that the job goes on."""
    return detaching(f"job {job.name} goes on; see it in the dashboard, {job.connection.address}")


def follow(job: "SubmittedJob[Any]") -> None:
    """Show a job's lines for the user, to its end."""
    with detaching_from(job):
        for line in job.progress():
            say(line)
