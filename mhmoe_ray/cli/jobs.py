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
"""Smallest number of logical CPUs that a local cluster is started with."""


def cluster_for(section: "ClusterSpec", needed: "Sequence[Location]", cpus: int, address: str | None) -> "Connection":
    """Return a connection to the cluster to run on; start a local cluster, large enough to train on later, if none is
    named.

    Args:
        section: cluster section of the spec.
        needed: locations that the cluster's nodes read and write.
        cpus: number of logical CPUs that a local cluster must have.
        address: address of the cluster that the user asked for; None for the default.

    Raises:
        ClusterError: the cluster cannot be reached, or the local one has fewer logical CPUs than needed.
        SpecError: a needed path is on this machine, and the cluster's nodes cannot be expected to see it.
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
    """Return a connection to the cluster that a run of this spec goes to, after checking that it can hold the run.

    Raises:
        ClusterError: the cluster can never hold the run's workers, or for a reason of `cluster_for`.
        SpecError: for the reason of `cluster_for`.
    """
    check_gpus_of_this_machine(spec, address)
    connection = cluster_for(spec.cluster, [spec.storage, spec.data.prepared], spec.cluster.cpus, address)
    check_room(spec, connection)
    return connection


def check_gpus_of_this_machine(spec: "RunSpec", address: str | None) -> None:
    """Refuse a run with GPUs on a machine without enough GPUs, before a local cluster is started for it.

    Raises:
        ClusterError: a local cluster would be started, and it could never hold the run.
    """
    from mhmoe_ray.cluster.connect import connect_if_there
    from mhmoe_ray.cluster.nodes import gpus_of_this_machine
    from mhmoe_ray.planner.placement import Node

    if spec.cluster.gpus_per_worker and connect_if_there(address) is None:
        here = Node("this machine", max(spec.cluster.cpus, LOCAL_CPUS), gpus_of_this_machine())
        _check_room(spec, [here], "local cluster")


def check_room(spec: "RunSpec", connection: "Connection") -> None:
    """Refuse a run that its cluster can never hold; if the cluster may grow, print what the run will wait for.

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
    """Return the argument that names a run in a command: its id if commands look into its storage folder, else its
    path."""
    from mhmoe_ray.storage import location

    looked_in = location(os.environ.get("MHMOE_STORAGE", STORAGE)).absolute()
    return run.id if run.path.parent == looked_in else shlex.quote(str(run.path))


def check_can_train(spec: "RunSpec") -> None:
    """Check the data of a spec now, so that an error is not left to a job that has just started.

    Raises:
        DataError: text is missing, or the prepared data does not suffice for the spec or was made with other settings.
    """
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
    """Within this context, Ctrl-C ends the command and prints that the job goes on."""
    return detaching(f"job {job.name} goes on; see it in the dashboard, {job.connection.address}")


def follow(job: "SubmittedJob[Any]") -> None:
    """Print a job's lines for the user until the job ends."""
    with detaching_from(job):
        for line in job.progress():
            say(line)
