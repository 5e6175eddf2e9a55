"""Bytes between two made-up nodes against those that the drawn routes demand, and a slow link that is removed again."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from mhmoe_ray.bench.dispatch import cases
from mhmoe_ray.bench.dispatch.cases import slow_link
from mhmoe_ray.bench.dispatch.measure import first_failed
from mhmoe_ray.bench.timing import failure
from mhmoe_ray.errors import SpecError
from tests.cli.run import command, mhmoe_anew

NAMESPACES = Path("/run/netns")
needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("tc"), reason="needs root, ip and tc"
)


def test_dispatch_sends_what_the_drawn_routes_demand(tmp_path):
    shown = mhmoe_anew(tmp_path, "bench", "dispatch", "--tokens", "16", "--rounds", "1", "--json")
    found = shown.json()
    layers = {layer["layer"]: layer for layer in found["layers"]}
    assert list(layers) == ["SMoE", "fine-grained x 2", "fine-grained x 8", "MH-MoE h 2", "MH-MoE h 3"]
    for layer in layers.values():
        experts, expected = layer["moe"]["experts"], layer["expected"]
        # What is expected counts numbers of rows too: of each expert to each of two ranks, or two of each node.
        assert layer["flat"]["counted"] == expected["flat"] - 4 * 2 * experts // 4 * 8
        assert layer["hierarchical"]["counted"] == expected["hierarchical"] - 4 * 2 * 8
        assert len(layer["flat"]["seconds"]) == len(layer["hierarchical"]["seconds"]) == 1
    ratio = {name: layer["expected"]["hierarchical"] / layer["expected"]["flat"] for name, layer in layers.items()}
    assert ratio["SMoE"] > 1  # nothing to save, and gates travel
    # Nearly every row has one of 8 experts on the other node, where it goes once in place of 4 times.
    assert ratio["fine-grained x 8"] == pytest.approx(0.25, abs=0.02)
    assert "fine-grained x 8" in shown.err


@pytest.mark.parametrize("end", ["exit 3", "kill -9 $$"])
def test_the_first_rank_that_fails_is_named_also_where_a_signal_ended_it(end):
    ranks = [subprocess.Popen(["/bin/sh", "-c", script]) for script in ("exit 0", end, "exec sleep 60")]
    try:
        assert first_failed(ranks) == 1
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    why = {"exit 3": "exit code 3", "kill -9 $$": "it was ended by SIGKILL"}[end]
    assert str(failure("rank 1", "", ranks[1].returncode)) == f"rank 1: {why}; mend that and measure again"


def test_ranks_that_all_end_well_have_none_that_failed():
    ranks = [subprocess.Popen(["/bin/sh", "-c", f"sleep 0.{i}"]) for i in range(3)]
    assert first_failed(ranks) is None


@pytest.mark.parametrize("rate", ["fast", "200", "200mbit; reboot"])
def test_what_is_no_rate_is_refused(rate):
    with pytest.raises(SpecError, match="it is not a rate"), slow_link(rate):
        pass


def test_without_root_or_tools_a_link_is_refused(monkeypatch):
    monkeypatch.setattr(cases.shutil, "which", lambda tool: "/sbin/ip")
    monkeypatch.setattr(cases.os, "geteuid", lambda: 1000)
    with pytest.raises(SpecError, match="network namespaces need root"), slow_link("1gbit"):
        pass
    monkeypatch.setattr(cases.shutil, "which", lambda tool: None if tool == "tc" else "/sbin/ip")
    with pytest.raises(SpecError, match="network namespaces need tc"), slow_link("1gbit"):
        pass


@pytest.mark.system
@needs_root
def test_over_a_slow_link_bytes_are_what_the_drawn_routes_demand(tmp_path):
    """Headers and other TCP overhead add about 1 per cent, at packets as large as a virtual interface takes."""
    options = ("--tokens", "512", "--rounds", "3", "--slow-link", "400mbit", "--json")
    for layer in mhmoe_anew(tmp_path, "bench", "dispatch", *options).json()["layers"]:
        for dispatch in ("flat", "hierarchical"):
            crossed, expected = layer[dispatch]["over_link"], layer["expected"][dispatch]
            assert len(crossed) == 3
            assert all(1 < count / expected < 1.04 for count in crossed), (layer["layer"], dispatch)
            # All of it goes through the link at its rate, about half each way, but for what may pass at once.
            assert min(layer[dispatch]["seconds"]) > (0.45 * expected - 256e3) * 8 / 400e6


@pytest.mark.system
@needs_root
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_link_is_gone_however_the_command_ends(tmp_path, number):
    args = command("bench", "dispatch", "--tokens", "4096", "--rounds", "100", "--slow-link", "10mbit")
    process = subprocess.Popen(
        args,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        start_new_session=True,
        # As from a terminal: a test run in the background hands down an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    names = [f"mhmoe-{process.pid}-{end}" for end in "ab"]
    while not (all((NAMESPACES / name).exists() for name in names) and len(_inside(names)) == 4):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ranks = _inside(names)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode
    assert not any((NAMESPACES / name).exists() for name in names)
    assert not any(Path("/proc", pid).exists() for pid in ranks)


def _inside(names: list[str]) -> list[str]:
    """Return the ids of the processes in these network namespaces."""
    listed = [subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout for name in names]
    return " ".join(listed).split()
