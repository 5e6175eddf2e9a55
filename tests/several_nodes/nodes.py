"""A Ray cluster of several nodes on this machine: a head, and nodes that tests kill, drain and bring back."""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mhmoe_ray.cluster.spawn import LocalCluster
from tests.watch import wait_until

RACKS = ("left", "right", "left", "right")
"""Value of the label "rack" of each node."""
SLOTS = 3
"""Number of workers of two CPUs that a node has room for.

The head has a single CPU, so that workers land on nodes only and their stream always has that CPU.
"""

SETTINGS = {
    # A node counts as dead after some seconds without a sign of life, not after half a minute.
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
    # No Python for each logical CPU before it has something to do.
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_worker_prestart": "0",
    # A placement that counts on a dead node is given up after this, not after 15 s.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5",
    # A head that was started as for one machine does not ask at all; Ray Train asks more often than every 5 s and 2 s.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}


class Nodes:
    def __init__(self, head: LocalCluster, environment: dict[str, str]) -> None:
        """Start the helper of a cluster.

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
        """Send a request to the helper, and return its answer; helper.py lists the requests."""
        assert self._helper.stdin
        assert self._helper.stdout
        self._helper.stdin.write(json.dumps([verb, *args]) + "\n")
        self._helper.stdin.flush()
        answer = self._helper.stdout.readline()
        assert answer, "the helper is gone"
        return json.loads(answer)

    def labels(self, name: str) -> dict[str, str]:
        """Return the values of a label of the living nodes, by Ray's ids."""
        return {node: labels[name] for node, labels in self.ask("nodes").items() if name in labels}

    def id_of(self, index: int) -> str:
        return next(node for node, label in self.labels("node_index").items() if label == str(index))

    @contextmanager
    def leave_slots(self, slots: Sequence[int]) -> Iterator[None]:
        """Leave room for so many workers on each node during the block, and hold the remaining CPUs."""
        cpus_to_hold = {
            self.id_of(index): 2 * (SLOTS - free_slots) for index, free_slots in enumerate(slots) if free_slots < SLOTS
        }
        self.ask("hold", cpus_to_hold)
        try:
            yield
        finally:
            self.ask("release")

    def kill(self, index: int) -> None:
        self._living_indices.discard(index)
        self.ask("kill", index)

    def bring_back(self) -> None:
        """Start the nodes that were killed, or all of them at first, and wait until all are there."""
        for index in set(range(len(RACKS))) - self._living_indices:
            self.ask("start", index, 2 * SLOTS, {"node_index": str(index), "rack": RACKS[index]})
            self._living_indices.add(index)
        all_indices = [str(number) for number in range(len(RACKS))]
        wait_until(lambda: sorted(self.labels("node_index").values()) == all_indices, "all nodes")

    @contextmanager
    def drained_and_replaced(self, index: int) -> Iterator[None]:
        """Announce that a node will be taken away within a minute; at the end, kill it and start another one."""
        assert self.ask("drain", self.id_of(index), 60)
        try:
            yield
        finally:
            self.kill(index)
            self.bring_back()

    def stop(self) -> None:
        assert self._helper.stdin
        assert self._helper.stdout
        self._helper.stdin.close()
        self._helper.wait(60)
        self._helper.stdout.close()
