"""Test of the benchmark of checkpoints, which measures how long saving a checkpoint takes."""

import itertools

import pytest
import torch

from mhmoe_ray.bench import checkpoints
from mhmoe_ray.bench.timing import Hardware
from tests.benchmarks import checkpoint
from tests.benchmarks.process import run_benchmark
from tests.cli.run import assert_one_line
from tests.support.specs import tiny_spec


@pytest.mark.long
def test_all_durations_use_device_clock(tmp_path, monkeypatch):
    """All durations come from `device_clock`, which waits for the device, so that work still running on a GPU counts.

    The test replaces that clock with one that ticks once at each read.
    """
    devices, ticks = [], itertools.count()

    def fake_clock(device):
        devices.append(device)
        return lambda: float(next(ticks))

    monkeypatch.setattr(checkpoints, "device_clock", fake_clock)
    device = torch.device("cpu")
    data = checkpoint.measure(tiny_spec(), 2, tmp_path, Hardware(device, "here", 1)).data
    assert devices == [device]
    assert data["steps"] == data["beside"] == data["torch_save"] == [1.0, 1.0]
    # The saver itself measures the pause and the time until a checkpoint is complete.
    assert all(0 < pause < seconds for pause, seconds in zip(data["pauses"], data["committed"], strict=True))


@pytest.mark.long
def test_impossible_width_is_one_line(tmp_path):
    result = run_benchmark(tmp_path, "checkpoint", "--d-model", "130")
    assert_one_line(result, 3, "checkpoint: d_model 130 must be a multiple of twice")
