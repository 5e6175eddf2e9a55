"""The nodes of a cluster, their free resources, and the logs of their processes, all read from its dashboard.

A dashboard that does not answer is a ClusterError.
"""

import codecs
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlencode

from mhmoe_ray.cluster import dashboard
from mhmoe_ray.cluster.connect import Connection
from mhmoe_ray.errors import JobError
from mhmoe_ray.planner.placement import Node

# This matches a usage line like "2.0/8.0 CPU (1.0 used of 2.0 reserved in placement groups)". Everything that placement
# groups reserve is taken, but the first number counts only the used part of it, so `_taken_resources` adds the rest.
_USAGE = re.compile(r"([\d.]+)/([\d.]+) (CPU|GPU)(?: \(([\d.]+) used of ([\d.]+) reserved in placement groups\))?$")

MAX_NODES = 10_000
"""Largest number of nodes that Ray's state API lists."""


def free_nodes(connection: Connection, domain_label: str | None) -> list[Node]:
    """Return a cluster's live nodes with their free CPUs and GPUs, named by host and, if they share it, by id.

    `domain_label` is the node label that names a node's domain; None leaves all domains empty.
    """
    return _read_nodes(connection, domain_label, are_free=True)


def total_nodes(connection: Connection, domain_label: str | None = None) -> list[Node]:
    """Return the nodes of `free_nodes` with all of their CPUs and GPUs, whether free or used."""
    return _read_nodes(connection, domain_label, are_free=False)


@dashboard.reads_answers
def _read_nodes(connection: Connection, domain_label: str | None, *, are_free: bool) -> list[Node]:
    alive, usage = dashboard.nodes(connection.address, connection.token)
    domains = _labels(connection, domain_label) if domain_label else {}
    hosts = Counter(node["nodeManagerHostname"] for node in alive)
    nodes = []
    for node in alive:
        host, total = node["nodeManagerHostname"], node["resourcesTotal"]
        taken_resources = _taken_resources(usage.get(node["nodeId"], "")) if are_free else {}
        name = host if hosts[host] == 1 else f"{host} {node['nodeId'][:6]}"
        cpus, gpus = (max(0.0, total.get(kind, 0.0) - taken_resources.get(kind, 0.0)) for kind in ("CPU", "GPU"))
        nodes.append(Node(name, cpus, gpus, domains.get(node["nodeId"], "")))
    return nodes


def gpus_of_this_machine() -> int:
    """Return the number of GPUs that Ray would detect on this machine if it were started here."""
    from mhmoe_ray.ray_compat import get_accelerator_manager_for_resource

    return int(get_accelerator_manager_for_resource("GPU").get_current_node_num_accelerators())


_PYTHON = re.compile(r"--python_worker_command=(.+?) \S*/(?:setup_worker|default_worker)\.py")
_OWN_PYTHON = {"pip", "uv", "conda", "py_executable", "container", "image_uri"}
"""Keys of a runtime environment that bring a Python interpreter of their own, which comes first on the PATH."""


@dashboard.reads_answers
def head_python(connection: Connection, runtime_env: Mapping[str, Any]) -> str:
    """Return the Python interpreter that a job uses on the head node, as a path or a command.

    It is Ray's own interpreter, which need not be on the PATH. It is the command `python` if the runtime environment
    brings an interpreter, or if the path of Ray's is not found.
    """
    if _OWN_PYTHON & runtime_env.keys():
        return "python"
    # The interpreter is read from the command line of the head node's raylet, which names it for its workers.
    nodes = dashboard.get(connection.address, "/nodes?view=summary", connection.token)["data"]["summary"]
    commands = [" ".join(node.get("cmdline", [])) for node in nodes]
    heads = [command for command in commands if "node:__internal_head__" in command]
    match = _PYTHON.search(heads[0]) if heads else None
    return match[1] if match else "python"


def _labels(connection: Connection, label: str) -> dict[str, str]:
    """Return the value of a node label by node id, for those nodes that have the label."""
    # The summary of nodes has labels too, but Ray renames their keys there (rack_id becomes rackId), so the labels are
    # read from the state API.
    nodes = dashboard.get(connection.address, f"/api/v0/nodes?limit={MAX_NODES}", connection.token)
    labels = {node["node_id"]: node["labels"] or {} for node in nodes["data"]["result"]["result"]}
    return {node: node_labels[label] for node, node_labels in labels.items() if label in node_labels}


def _taken_resources(usage: str) -> dict[str, float]:
    """Return a node's taken CPUs and GPUs from Ray's usage lines, which a new node does not have yet."""
    amounts: dict[str, float] = {}
    for line in usage.splitlines():
        if match := _USAGE.match(line):
            used_amount, _, kind, used_reserved, reserved = match.groups()
            amounts[kind] = float(used_amount) - float(used_reserved or 0) + float(reserved or 0)
    return amounts


MARK_PREFIXES = (":job_id:", ":actor_name:", ":task_name:")
"""Prefixes of lines that Ray inserts into a log to mark which job, actor or task wrote the lines after them."""
ALL_LINES = 1_000_000_000
"""Number of lines to request for a whole log; no log has more."""


def process_log(connection: Connection, node: str, pid: int, kind: str, *, follow: bool = False) -> Iterator[str]:
    """Yield the lines that a worker process wrote to stderr (`kind` "err") or stdout ("out"), without those of Ray.

    `follow` waits for new lines forever. A node that is gone, or that has no log of the process, is a JobError.
    """
    query = {
        "node_id": node,
        "pid": pid,
        "suffix": kind,
        "lines": ALL_LINES,
        "timeout": 10,
        "filter_ansi_code": "true",
    }
    path = f"/api/v0/logs/{'stream' if follow else 'file'}?{urlencode(query)}"
    with dashboard.streamed(connection.address, path, connection.token) as (status, chunks):
        if status != 200:
            subject, fix = (
                f"log of process {pid}",
                "see `mhmoe status`, which keeps the last lines of a worker that failed",
            )
            raise JobError(subject, "its node is gone, or has deleted the log", fix)
        for line in dashboard.complete_lines(codecs.iterdecode(chunks, "utf-8", "replace")):
            if not line.startswith(MARK_PREFIXES):
                yield line.rstrip("\r")
