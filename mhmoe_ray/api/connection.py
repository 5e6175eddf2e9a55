"""Connection to the cluster for a job, and checks of a run and its data before the job starts."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mhmoe_ray.api.defaults import LOCAL_CPUS, OnNote, ignore_note
from mhmoe_ray.cluster.connect import Connection, check_ray_release, connect_if_running, start
from mhmoe_ray.cluster.nodes import gpus_of_this_machine, total_nodes
from mhmoe_ray.errors import ClusterError, SpecError
from mhmoe_ray.planner.placement import Node, build_layout, capacity_shortfall, plan_workers
from mhmoe_ray.spec import ClusterSpec, DataSpec, RunSpec
from mhmoe_ray.storage import Location
from mhmoe_ray.terminal import Activity


def connect_to_cluster(
    section: ClusterSpec,
    required_paths: Sequence[Location],
    cpus: int,
    address: str | None = None,
    on_note: OnNote = ignore_note,
) -> Connection:
    """Return a connection to the cluster for a job; start a local cluster if none is named and none runs.

    The cluster's nodes must reach `required_paths`, and a local cluster must have `cpus` logical CPUs. A cluster out of
    reach, too small or of another minor version of Ray is a ClusterError. A file path on a cluster elsewhere is a
    SpecError, unless the section sets shared_filesystem.
    """
    on_note(Activity("connecting to the cluster"))
    connection = connect_if_running(address)
    if connection is None:
        on_note("starting a Ray cluster on this machine; `mhmoe cluster down` ends it")
        on_note(Activity("starting Ray"))
        # A local cluster cannot grow, so one that is started for a small job must be large enough to train later.
        connection = start(max(cpus, section.cpus, LOCAL_CPUS))
    check_ray_release(connection)
    if connection.local_cluster and connection.local_cluster.cpus < cpus:
        fix = "stop it with `mhmoe cluster down`; the next command starts one that is large enough"
        raise ClusterError("local cluster", f"it has {connection.local_cluster.cpus} CPUs and {cpus} are needed", fix)
    # Only file paths are checked. A location in an object store is not a `Path` object, and all nodes can reach it.
    local_path = next((path for path in required_paths if isinstance(path, Path)), None)
    if local_path and not connection.is_local_machine and not section.shared_filesystem:
        reason = f"the nodes of {connection.address} cannot be expected to see {local_path} of this machine"
        fix = (
            "put storage and data.prepared on s3:// or gs://, or on a file system that all of them mount, and set "
            "cluster.shared_filesystem"
        )
        raise SpecError("storage", reason, fix)
    return connection


class WorkerDemand(NamedTuple):
    """The smallest number of workers for a job, their resources, and texts for a cluster that cannot hold them."""

    workers: int
    cpus: int
    gpus: int
    advice: str
    """Advice to the user if the cluster can never hold the workers."""
    waiting: str
    """Text about what the job does until a cluster that may grow can hold the workers."""

    @classmethod
    def of_training(cls, spec: RunSpec) -> "WorkerDemand":
        """Return the workers that a training run needs at least."""
        cluster = spec.cluster
        change = "set cluster.gpus_per_worker to 0, or " if cluster.gpus_per_worker else "lower cluster.workers, or "
        return cls(
            # A run starts as soon as there is room for its smallest number of workers, so only this number is checked.
            spec.worker_counts[0],
            cluster.cpus_per_worker,
            cluster.gpus_per_worker,
            f"{change}name a larger cluster",
            "the run waits until nodes join, and `mhmoe status` shows it",
        )


def connect_to_train(spec: RunSpec, address: str | None = None, on_note: OnNote = ignore_note) -> Connection:
    """Return a connection to the cluster that will train this spec, after checking that it can hold the run.

    Errors are those of `connect_to_cluster`, and a ClusterError if the cluster can never hold the run's workers.
    """
    demand = WorkerDemand.of_training(spec)
    check_gpus_of_this_machine(demand, spec.cluster.cpus, address)
    connection = connect_to_cluster(
        spec.cluster, [spec.storage, spec.data.prepared], spec.cluster.cpus, address, on_note
    )
    check_capacity(demand, connection, on_note)
    return connection


def check_gpus_of_this_machine(demand: WorkerDemand, cpus: int, address: str | None) -> None:
    """Raise a ClusterError if a local cluster with `cpus` CPUs that a job would start has too few GPUs for it."""
    # `check_capacity` later checks the nodes of a running cluster.
    if demand.gpus and connect_if_running(address) is None:
        this_machine = Node("this machine", max(cpus, LOCAL_CPUS), gpus_of_this_machine())
        _check_capacity(demand, [this_machine], "local cluster")


def check_capacity(demand: WorkerDemand, connection: Connection, on_note: OnNote = ignore_note) -> None:
    """Raise a ClusterError if a cluster can never hold a job's workers; `on_note` gets a warning if it may grow."""
    try:
        _check_capacity(demand, total_nodes(connection), f"cluster {connection.address}")
    except ClusterError as e:
        if connection.local:
            raise
        on_note(f"warning: {e.reason}; {demand.waiting}")


def check_placement(cluster: ClusterSpec, connection: Connection) -> None:
    """Raise a ClusterError if a cluster has room for all workers, but not in the places for which the section asks."""
    if cluster.domain_label is None and cluster.straddling == "warn":
        return
    nodes = total_nodes(connection, cluster.domain_label)
    workers = cluster.max_world_size
    rank_nodes = plan_workers(nodes, cluster.cpus_per_worker, cluster.gpus_per_worker, workers, cluster.ep)
    if len(rank_nodes) < workers:
        # The run waits for more nodes, which may have the label and the room.
        return
    if cluster.domain_label and not any(node.domain for node in nodes):
        reason = f"no node of {connection.address} has the label {cluster.domain_label}"
        fix = "correct it, leave it out, or start nodes with `ray start --labels`"
        raise ClusterError("cluster.domain_label", reason, fix)
    refusal_reason = build_layout(rank_nodes, cluster.ep).groups.refusal_reason
    if cluster.straddling == "refuse" and refusal_reason:
        fix = "lower cluster.ep, add larger nodes, or set cluster.straddling to warn"
        raise ClusterError("placement", f"whichever nodes are chosen, {refusal_reason}", fix)


def _check_capacity(demand: WorkerDemand, nodes: list[Node], name: str) -> None:
    shortage = capacity_shortfall(nodes, demand.cpus, demand.gpus, demand.workers)
    if shortage:
        raise ClusterError(name, shortage, demand.advice)


def check_training(spec: RunSpec) -> None:
    """Raise an error if a spec cannot be trained or its data cannot be used, before a job starts that would fail.

    A SpecError says that torch.compile cannot compile the model. A DataError says that text is missing, the chat
    template cannot be used, or the prepared data does not suffice or was made with other settings.
    """
    # These imports are delayed, because the modules import pyarrow, which only this check of data needs.
    from mhmoe_ray.checkpoint.start.record import plan_start
    from mhmoe_ray.data.order.mixture import training_order
    from mhmoe_ray.data.shards.manifest import read_data_manifest
    from mhmoe_ray.data.shards.recipe import check_recipe

    spec.check_compilation()
    prepared = read_data_manifest(spec.data.prepared)
    if prepared:
        check_recipe(spec.data.prepared, prepared, spec)
        record = plan_start(spec)
        training_order(spec, prepared, record.samples_before if record else None)
    else:
        check_raw_data(spec.data)


def check_raw_data(data: DataSpec) -> None:
    """Raise a DataError, before a job starts that would fail, if raw data is missing or its chat template is wrong."""
    from mhmoe_ray.data.chat.template import check_template
    from mhmoe_ray.data.sources import find_files

    find_files(data)
    if data.chat_sources:
        check_template(data)
