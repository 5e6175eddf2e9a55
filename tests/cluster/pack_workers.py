"""Place workers on nodes of 6, 2 and 4 GPUs, several Ray nodes on this machine, as Ray Train asks for them.

Run as a process of its own. For each of two runs that exist at the same time, it prints where the workers were forecast
to be and where Ray put them, as JSON lists with a domain for each rank.
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


def free(connection: Connection, gpus: int) -> list[Node]:
    """Return the free nodes as soon as the dashboard reports this number of GPUs.

    Ray gathers what is free every few seconds.
    """
    deadline = time.monotonic() + 60
    free: list[Node] = []
    while time.monotonic() < deadline:
        free = free_nodes(connection, "rack_id")
        if sum(node.gpus for node in free) == gpus:
            return free
        time.sleep(0.2)
    raise SystemExit(f"the dashboard tells of {free}")


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": True})
    for gpus, cpus in ((6, 8), (2, 3), (4, 6)):  # at no time alike: among equals Ray's order is arbitrary
        cluster.add_node(num_cpus=cpus, num_gpus=gpus, labels={"rack_id": f"rack of {gpus}"})
    url = ray.init(address=cluster.address, logging_level="ERROR").dashboard_url
    connection = Connection(f"http://{url}", False, False, None)
    for workers, cpus_before in ((8, 12), (3, 4)):
        forecast = pack_workers(free(connection, cpus_before), 1, 1, workers)
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
