"""Tests of the bytes that two simulated nodes exchange, and of the slow link between them."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from mhmoe_ray.bench.timing import process_failure
from mhmoe_ray.errors import SpecError
from tests.benchmarks.dispatch import link
from tests.benchmarks.dispatch.link import slow_link
from tests.benchmarks.dispatch.measure import wait_for_ranks
from tests.benchmarks.process import command, run_benchmark

NAMESPACES = Path("/run/netns")
needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("tc"), reason="needs root, ip and tc"
)


@pytest.mark.slow  # tests/planner/test_traffic.py tests the expected bytes, and tests/distributed the dispatch
def test_dispatch_sends_expected_bytes(tmp_path):
    result = run_benchmark(tmp_path, "dispatch", "--tokens", "16", "--rounds", "1", "--json")
    output = result.json()
    layers = {layer["layer"]: layer for layer in output["layers"]}
    assert list(layers) == ["SMoE", "fine-grained x 2", "fine-grained x 8", "MH-MoE h 2", "MH-MoE h 3"]
    for layer in layers.values():
        experts, expected = layer["moe"]["experts"], layer["expected"]
        # The expected bytes include counts of rows, each of 8 bytes, which `counted` leaves out. In flat dispatch, each
        # of 4 ranks sends one count for each expert of the 2 ranks on the other node. In hierarchical dispatch, each
        # rank sends 2 counts.
        assert layer["flat"]["counted"] == expected["flat"] - 4 * 2 * experts // 4 * 8
        assert layer["hierarchical"]["counted"] == expected["hierarchical"] - 4 * 2 * 8
        assert len(layer["flat"]["seconds"]) == len(layer["hierarchical"]["seconds"]) == 1
    ratio = {name: layer["expected"]["hierarchical"] / layer["expected"]["flat"] for name, layer in layers.items()}
    # With one expert per row, hierarchical dispatch saves no bytes, and it also sends gates.
    assert ratio["SMoE"] > 1
    # Nearly every row has experts on the other node, on average 4 of its 8. Flat dispatch sends the row to each of the
    # 4, and hierarchical dispatch sends it once.
    assert ratio["fine-grained x 8"] == pytest.approx(0.25, abs=0.02)
    assert "fine-grained x 8" in result.err


@pytest.mark.parametrize("failing_script", ["exit 3", "kill -9 $$"])
def test_first_failed_rank_is_named(failing_script):
    ranks = [subprocess.Popen(["/bin/sh", "-c", script]) for script in ("exit 0", failing_script, "exec sleep 60")]
    try:
        assert wait_for_ranks(ranks) == 1
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    reason = {"exit 3": "exit code 3", "kill -9 $$": "it was ended by SIGKILL"}[failing_script]
    assert str(process_failure("rank 1", "", ranks[1].returncode)) == f"rank 1: {reason}; fix that and measure again"


def test_successful_ranks_report_no_failure():
    ranks = [subprocess.Popen(["/bin/sh", "-c", f"sleep 0.{i}"]) for i in range(3)]
    assert wait_for_ranks(ranks) is None


@pytest.mark.parametrize("rate", ["fast", "200", "200mbit; reboot"])
def test_invalid_rate_is_refused(rate):
    with pytest.raises(SpecError, match="it is not a rate"), slow_link(rate):
        pass


def test_link_requires_root_and_tools(monkeypatch):
    monkeypatch.setattr(link.shutil, "which", lambda tool: "/sbin/ip")
    monkeypatch.setattr(link.os, "geteuid", lambda: 1000)
    with pytest.raises(SpecError, match="network namespaces need root"), slow_link("1gbit"):
        pass
    monkeypatch.setattr(link.shutil, "which", lambda tool: None if tool == "tc" else "/sbin/ip")
    with pytest.raises(SpecError, match="network namespaces need tc"), slow_link("1gbit"):
        pass


@pytest.mark.system
@needs_root
def test_slow_link_carries_expected_bytes(tmp_path):
    """The link carries the expected bytes and up to 4 % more for TCP, and is not faster than its rate."""
    options = ("--tokens", "512", "--rounds", "3", "--slow-link", "400mbit", "--json")
    for layer in run_benchmark(tmp_path, "dispatch", *options).json()["layers"]:
        for dispatch in ("flat", "hierarchical"):
            link_bytes, expected = layer[dispatch]["over_link"], layer["expected"][dispatch]
            assert len(link_bytes) == 3
            assert all(1 < count / expected < 1.04 for count in link_bytes), (layer["layer"], dispatch)
            # All bytes but those of a burst pass the link at its rate. About half of them go in each direction, at the
            # same time.
            assert min(layer[dispatch]["seconds"]) > (0.45 * expected - 256e3) * 8 / 400e6


@pytest.mark.system
@needs_root
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_link_is_removed_on_signal(tmp_path, number):
    args = command("dispatch", "--tokens", "4096", "--rounds", "100", "--slow-link", "10mbit")
    process = subprocess.Popen(
        args,
        stderr=subprocess.PIPE,
        start_new_session=True,
        # Tests that run in the background ignore SIGINT, and the child would inherit this, so the signal would not end
        # it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    names = [f"mhmoe-{process.pid}-{end}" for end in "ab"]
    while not (all((NAMESPACES / name).exists() for name in names) and len(_processes_in(names)) == 4):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ranks = _processes_in(names)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode
    assert not any((NAMESPACES / name).exists() for name in names)
    assert not any(Path("/proc", pid).exists() for pid in ranks)


def _processes_in(names: list[str]) -> list[str]:
    """Return the ids of the processes in these network namespaces."""
    outputs = [subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout for name in names]
    return " ".join(outputs).split()
