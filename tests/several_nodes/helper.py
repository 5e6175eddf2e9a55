"""Process that starts, kills and uses the nodes of a cluster: `python -m tests.several_nodes.helper ADDRESS`.

It reads requests from stdin and writes answers to stdout, both as one line of JSON:

["start", index, CPUs, labels]  start a node
["kill", index]                 kill the node's raylet by SIGKILL, and all its other processes
["nodes"]                       return the labels of each living node, by Ray's node id
["hold", {node: CPUs}]          reserve CPUs of nodes, so that runs cannot use them
["release"]                     release all reserved CPUs
["drain", node, seconds]        announce that the node will be preempted after some seconds
["describe", files]             return the files' sizes and hashes, computed by all nodes, and the number of tasks

`ray start` cannot start the nodes: it refuses to join a cluster that listens on loopback only.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import ray
from ray._private.node import Node
from ray._private.parameter import RayParams
from ray._raylet import GcsClient
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mhmoe_ray.train import stream_start


@ray.remote
class Holder:
    """Actor that only reserves CPUs."""

    def is_alive(self) -> bool:
        return True


class Helper:
    """Handler of the requests to this process: each public method answers the requests of its name."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._node_of_index: dict[str, Node] = {}
        self._holders: list[Any] = []

    def start(self, index: str, cpus: int, labels: dict[str, str]) -> None:
        """Start a Ray node on this machine with these logical CPUs and labels."""
        params = RayParams(
            gcs_address=self._address,
            node_ip_address="127.0.0.1",
            num_cpus=cpus,
            num_gpus=0,
            labels=labels,
            object_store_memory=128 << 20,
            # With 0, Ray chooses free ports. With fixed ports or ranges, all raylets of this machine would use the same
            # ports.
            node_manager_port=0,
            min_worker_port=0,
            max_worker_port=0,
            dashboard_agent_listen_port=0,
            include_log_monitor=False,
        )
        self._node_of_index[index] = Node(params, head=False, shutdown_at_exit=True, spawn_reaper=True)

    def kill(self, index: str) -> None:
        """Kill all processes of a node that this process has started."""
        node = self._node_of_index.pop(index)
        node.kill_raylet()
        node.kill_all_processes(check_alive=False, wait=True)

    def nodes(self) -> dict[str, dict[str, str]]:
        return {node["NodeID"]: node["Labels"] for node in ray.nodes() if node["Alive"]}

    def hold(self, cpus: dict[str, int]) -> None:
        """Reserve CPUs of nodes, given by Ray's node id, until `release`."""
        for node, count in cpus.items():
            on_node = NodeAffinitySchedulingStrategy(node, soft=False)
            self._holders.append(Holder.options(num_cpus=count, scheduling_strategy=on_node).remote())
        ray.get([holder.is_alive.remote() for holder in self._holders])

    def release(self) -> None:
        for holder in self._holders:
            ray.kill(holder)
        self._holders.clear()

    def drain(self, node: str, seconds: float) -> bool:
        """Tell Ray that a node will be preempted in some seconds; return whether Ray accepts this."""
        reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline = int((time.time() + seconds) * 1000)
        accepted, _ = GcsClient(address=self._address).drain_node(node, reason, "taken away", deadline)
        return bool(accepted)

    def describe(self, files: list[str]) -> tuple[list[dict[str, Any]], int]:
        """Return the sizes and hashes of files, computed by tasks on all nodes, and the number of those tasks."""
        stream_start.SINGLE_NODE_BYTES, tasks, options = 0, [], stream_start._describe_share.options
        with mock.patch.object(
            stream_start._describe_share,
            "options",
            lambda **task_options: tasks.append(task_options) or options(**task_options),
        ):
            entries = list(stream_start.describe_on_all_nodes([Path(file) for file in files]))
        return [entry.model_dump() for entry in entries], len(tasks)


def main() -> None:
    """Answer requests until stdin is closed."""
    answers = os.fdopen(os.dup(1), "w")
    # Only answers may be in stdout, to which Ray prints too, so everything else goes to stderr.
    os.dup2(2, 1)
    ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
    helper = Helper(sys.argv[1])
    for line in sys.stdin:
        verb, *args = json.loads(line)
        print(json.dumps(getattr(helper, verb)(*args)), file=answers, flush=True)


if __name__ == "__main__":
    main()
