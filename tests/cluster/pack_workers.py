"""Compare our forecast of the placement of workers with Ray's placement on a cluster with nodes of 6, 2 and 4 GPUs.

The nodes are Ray nodes on this machine. The script runs as a process of its own. It places the workers of two runs that
exist at the same time, as Ray Train does. For each run it prints a JSON list of two lists: the forecast domain of each
rank, and its domain in Ray's placement.
"""

import json
import sys
import time

import ray
from ray.cluster_utils import Cluster
from ray.util import placement_group, placement_group_table

from mhmoe_ray.cluster.connect import Connection
from mhmoe_ray.cluster.nodes import free_nodes
from mhmoe_ray.planner.placement import Node, pack_workers


def wait_for_free_gpus(connection: Connection, gpus: int) -> list[Node]:
    """Wait until the dashboard reports this total number of free GPUs, and return the nodes with their free resources.

    Raises:
        SystemExit: After a minute it still reports another number.
    """
    # Ray updates the free resources only every few seconds, so the first reports may be old.
    deadline = time.monotonic() + 60
    nodes: list[Node] = []
    while time.monotonic() < deadline:
        nodes = free_nodes(connection, "rack_id")
        if sum(node.gpus for node in nodes) == gpus:
            return nodes
        time.sleep(0.2)
    raise SystemExit(f"the dashboard does not report {gpus} free GPUs: {nodes}")


def main() -> None:
    """Start the cluster, place the workers of both runs, and print the forecast and the actual domains of each."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": True})
    # Nodes are never equally free, because Ray's order of equally free nodes is arbitrary.
    for gpus, cpus in ((6, 8), (2, 3), (4, 6)):
        cluster.add_node(num_cpus=cpus, num_gpus=gpus, labels={"rack_id": f"rack of {gpus}"})
    url = ray.init(address=cluster.address, logging_level="ERROR").dashboard_url
    connection = Connection(f"http://{url}", False, False, None)
    for workers, free_gpus in ((8, 12), (3, 4)):
        forecast = pack_workers(wait_for_free_gpus(connection, free_gpus), 1, 1, workers)
        group = placement_group([{"CPU": 1, "GPU": 1}] * workers, strategy="PACK")
        ray.get(group.ready(), timeout=60)
        labels = {node["NodeID"]: node["Labels"]["rack_id"] for node in ray.nodes() if "rack_id" in node["Labels"]}
        node_of_bundle = placement_group_table(group)["bundles_to_node_id"]
        print(
            json.dumps([[node.domain for node in forecast], [labels[node_of_bundle[rank]] for rank in range(workers)]])
        )
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
