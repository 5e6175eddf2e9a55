"""Tests of the nodes that a dashboard reports, and of Ray's placement of workers on them."""

import json
import os
import socket
import subprocess
import sys

import pytest
from ray.autoscaler._private.util import parse_usage

from mhmoe_ray.cluster import dashboard, nodes
from mhmoe_ray.cluster.connect import Connection, connect, connect_if_running
from mhmoe_ray.cluster.nodes import _taken_resources, free_nodes
from mhmoe_ray.planner.placement import Node
from tests.cli.run import mhmoe
from tests.conftest import USER_CLUSTER_VARIABLES


@pytest.mark.ray
def test_the_local_cluster_is_one_node_of_this_machine(local_cluster):
    [node] = free_nodes(connect(), "no_such_label")
    assert (node.name, node.gpus, node.domain) == (socket.gethostname(), 0, "")
    assert 0 <= node.cpus <= 8


def test_free_nodes_subtract_usage_and_name_nodes_of_one_host_apart(monkeypatch):
    def node_summary(number, host, **resources):
        return {"nodeId": f"{number}" * 10, "nodeManagerHostname": host, "resourcesTotal": resources}

    alive = [node_summary(1, "a", CPU=8.0, GPU=2.0), node_summary(2, "b", CPU=4.0), node_summary(3, "a", CPU=2.0)]
    usage = {"1" * 10: "3.0/8.0 CPU (1.0 used of 2.0 reserved in placement groups)\n1.0/2.0 GPU"}
    monkeypatch.setattr(dashboard, "nodes", lambda address, token: (alive, usage))
    monkeypatch.setattr(nodes, "_labels", lambda connection, label: {"2" * 10: "rack1"})
    assert free_nodes(Connection("http://head:8265", False, False, None), "rack") == [
        Node("a 111111", 4.0, 1.0, ""),
        Node("b", 4.0, 0.0, "rack1"),
        Node("a 333333", 2.0, 0.0, ""),
    ]


@pytest.mark.ray
def test_cluster_status_shows_address_nodes_and_cpus(local_cluster, tmp_path):
    for words in ((), ("--address", local_cluster.address)):
        status = mhmoe(tmp_path, "cluster", "status", "--json", *words).json()
        assert (status["dashboard"], status["nodes"], status["cpus"]) == (local_cluster.address, 1, 8)


def test_connect_if_running_returns_none_without_a_cluster(tmp_path, monkeypatch):
    monkeypatch.setenv("MHMOE_HOME", str(tmp_path))
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    assert connect_if_running() is None


def test_resources_reserved_by_placement_groups_count_as_taken():
    """The test takes its texts from `parse_usage`, the function with which Ray formats the usage of resources."""
    group = "1f5b8b8ff1a2ff30a6bd1b5b7ff81000000"
    usage = {"CPU": (5.0, 8.0), "GPU": (1.5, 4.0), "memory": (0.0, 2.0**30), "node:10.0.0.1": (0.0, 1.0)}
    assert _taken_resources("\n".join(parse_usage(usage, verbose=True))) == {"CPU": 5, "GPU": 1.5}
    usage |= {f"CPU_group_{group}": (1.0, 3.0), f"CPU_group_0_{group}": (1.0, 3.0), f"bundle_group_{group}": (0, 1e3)}
    assert _taken_resources("\n".join(parse_usage(usage, verbose=True))) == {"CPU": 5, "GPU": 1.5}
    assert _taken_resources("") == {}


@pytest.mark.slow
@pytest.mark.ray
def test_ray_packs_workers_as_forecast():
    """A first run is placed on free nodes, and then a second one on the resources that remain."""
    environment = {name: value for name, value in os.environ.items() if name not in USER_CLUSTER_VARIABLES}
    environment |= {"RAY_AUTH_MODE": "disabled"}
    # Ray in this process may have set this variable to hide all GPUs. With it, Ray refuses nodes that claim GPUs.
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    command = [sys.executable, "-m", "tests.cluster.pack_workers"]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    runs = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("[[")]
    assert [len(actual) for _, actual in runs] == [8, 3]
    assert all(forecast == actual for forecast, actual in runs)
    assert runs[0][1] == ["rack of 6"] * 6 + ["rack of 4"] * 2
    assert runs[1][1] == ["rack of 4"] * 2 + ["rack of 2"]
