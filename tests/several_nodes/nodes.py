"""A Ray cluster of several nodes on this machine: a head, and nodes that tests kill, drain and restart."""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

from mhmoe_ray.cluster.spawn import LocalCluster
from tests.support.watch import wait_until

RACKS = ("left", "right") * 4
"""Value of the label `rack` of each node, by the node's index."""
SLOTS = 3
"""Number of workers with two CPUs each that fit on a node.

The head has a single CPU, so workers are placed on the other nodes, and the data stream can always use that CPU.
"""

SETTINGS = {
    # With these settings, a node counts as dead some seconds after its last answer to a health check. By default it
    # would take half a minute.
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
    # Do not start a Python process for each logical CPU in advance.
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_worker_prestart": "0",
    # After this time, a start of workers that relies on a dead node is given up. Without this setting, RunTrainer sets
    # 15 s for elastic runs.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5",
    # These tests need the preemption watcher, which local clusters disable. Ray's defaults for its intervals are 5 s
    # and 2 s.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}


class Nodes:
    """A running cluster of several nodes, whose nodes have the indices 0 to 7."""

    def __init__(self, head: LocalCluster, environment: dict[str, str]) -> None:
        """Start the helper process, which has no node yet.

        Args:
            head: The running local cluster of a single CPU that is the head.
            environment: The environment that a client of the cluster needs.
        """
        self.head, self.address, self.environment = head, head.address, environment
        self._living_indices: set[int] = set()
        command = [sys.executable, "-m", "tests.several_nodes.helper", head.gcs_address]
        with (head.folder / "helper.log").open("wb") as log:
            self._helper = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )

    def ask(self, verb: str, *args: Any) -> Any:
        """Send a request to the helper process, and return its answer; helper.py lists the requests."""
        assert self._helper.stdin
        assert self._helper.stdout
        self._helper.stdin.write(json.dumps([verb, *args]) + "\n")
        self._helper.stdin.flush()
        answer = self._helper.stdout.readline()
        assert answer, "the helper is gone"
        return json.loads(answer)

    def labels(self, name: str) -> dict[str, str]:
        """Return the value of a label of each living node that has it, by Ray's node id."""
        return {node: labels[name] for node, labels in self.ask("nodes").items() if name in labels}

    def node_id(self, index: int) -> str:
        """Return Ray's id of the living node with this index."""
        return next(node for node, label in self.labels("node_index").items() if label == str(index))

    @contextmanager
    def leave_slots(self, slots: Sequence[int]) -> Iterator[None]:
        """Leave room for `slots[i]` workers on node i during the block, and for none on other nodes, by reserving the
        CPUs."""
        cpus_to_hold = {
            self.node_id(index): 2 * (SLOTS - free_slots)
            for index, free_slots in zip_longest(range(len(RACKS)), slots, fillvalue=0)
            if free_slots < SLOTS
        }
        self.ask("hold", cpus_to_hold)
        try:
            yield
        finally:
            self.ask("release")

    def kill(self, index: int) -> None:
        """Kill all processes of a node."""
        self._living_indices.discard(index)
        self.ask("kill", index)

    def bring_back(self) -> None:
        """Start all nodes that do not run, and wait until all are part of the cluster."""
        for index in set(range(len(RACKS))) - self._living_indices:
            self.ask("start", index, 2 * SLOTS, {"node_index": str(index), "rack": RACKS[index]})
            self._living_indices.add(index)
        all_indices = [str(number) for number in range(len(RACKS))]
        wait_until(lambda: sorted(self.labels("node_index").values()) == all_indices, "all nodes")

    @contextmanager
    def drained_and_replaced(self, index: int) -> Iterator[None]:
        """Announce that a node will be preempted in a minute; at the end of the block kill it and start a new one."""
        assert self.ask("drain", self.node_id(index), 60)
        try:
            yield
        finally:
            self.kill(index)
            self.bring_back()

    def stop(self) -> None:
        """End the helper process, and with it the nodes that it has started."""
        assert self._helper.stdin
        assert self._helper.stdout
        self._helper.stdin.close()
        self._helper.wait(60)
        self._helper.stdout.close()
