"""What a dashboard tells of its nodes, and whether Ray packs workers on them as forecast."""

import json
import os
import socket
import subprocess
import sys

import pytest
from ray.autoscaler._private.util import parse_usage

from mhmoe_ray.cluster import processes, tokens
from mhmoe_ray.cluster.connect import connect, connect_if_there
from mhmoe_ray.cluster.local import start_local, stop_local
from mhmoe_ray.cluster.nodes import _taken, free_nodes
from mhmoe_ray.placement.packing import Node, packed


@pytest.mark.ray
def test_the_local_cluster_is_one_node_of_this_machine(local_cluster):
    [node] = free_nodes(connect(), "no_such_label")
    assert (node.name, node.gpus, node.domain) == (socket.gethostname(), 0, "")
    assert 0 <= node.cpus <= 8


def test_without_a_cluster_none_is_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("MHMOE_HOME", str(tmp_path))
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    assert connect_if_there() is None


def test_what_placement_groups_reserve_is_taken_used_or_not():
    """In the words that Ray's own function finds for a usage."""
    group = "1f5b8b8ff1a2ff30a6bd1b5b7ff81000000"
    usage = {"CPU": (5.0, 8.0), "GPU": (1.5, 4.0), "memory": (0.0, 2.0**30), "node:10.0.0.1": (0.0, 1.0)}
    assert _taken("\n".join(parse_usage(usage, verbose=True))) == {"CPU": 5, "GPU": 1.5}
    usage |= {f"CPU_group_{group}": (1.0, 3.0), f"CPU_group_0_{group}": (1.0, 3.0), f"bundle_group_{group}": (0, 1e3)}
    assert _taken("\n".join(parse_usage(usage, verbose=True))) == {"CPU": 5, "GPU": 1.5}
    assert _taken("") == {}


# Asks for a placement group as Ray Train does, and says on which node each of its bundles is.
ASK = """
import json, sys, ray
from ray.util import placement_group, placement_group_table
ray.init(logging_level="ERROR")
asked = placement_group([{"CPU": 1, "GPU": 1}] * int(sys.argv[1]), strategy="PACK")
ray.get(asked.ready(), timeout=60)
print(json.dumps(placement_group_table(asked)["bundles_to_node_id"]))
input()
"""


@pytest.mark.slow
@pytest.mark.ray
def test_ray_packs_workers_as_forecast(tmp_path, monkeypatch):
    """Nodes of 6, 2 and 4 GPUs that are not there; then once more with what the first placement group leaves."""
    monkeypatch.setenv("MHMOE_HOME", str(tmp_path))
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    cluster = start_local(2)
    environment = {
        **os.environ,
        processes.MARK: str(cluster.folder),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(tokens.token_file()),
        "RAY_ADDRESS": cluster.gcs_address,
    }
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={cluster.gcs_address}"]
    ray += [f"--object-store-memory={100 << 20}", f"--plasma-directory={cluster.folder}", "--disable-usage-stats"]
    asking = []
    try:
        for gpus, rack in ((6, "a"), (2, "a"), (4, "b")):
            node = [f"--num-cpus={gpus + 2}", f"--num-gpus={gpus}", "--labels", f"rack_id={rack}"]
            subprocess.run([*ray, *node], env=environment, check=True, capture_output=True)

        def nodes(free_gpus):
            """As soon as the dashboard tells of so many; Ray gathers what is free every few seconds."""
            found: list[Node] = []
            for _ in range(120):
                found = free_nodes(connect(), "rack_id")
                if sum(node.gpus for node in found) == free_gpus:
                    return found
                subprocess.run(["sleep", "0.5"], check=True)
            raise AssertionError(found)

        for workers, before in ((8, 12), (3, 4)):
            there = nodes(before)
            assert {node.domain for node in there} == {"", "a", "b"}
            forecast = packed(there, 1, 1, workers)
            process = subprocess.Popen(
                [sys.executable, "-c", ASK, str(workers)],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            asking.append(process)
            at = json.loads(process.stdout.readline())
            counts = sorted((list(at.values()).count(node)) for node in set(at.values()))
            ours = [node.name for node in forecast]
            assert counts == sorted(ours.count(node) for node in set(ours))
            assert all(at[str(i)][:6] == node.name.split()[-1] for i, node in enumerate(forecast)), (at, forecast)
    finally:
        for process in asking:
            process.communicate("\n", timeout=60)
        assert stop_local()
