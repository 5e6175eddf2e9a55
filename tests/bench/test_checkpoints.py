"""Measuring for how long a checkpoint delays training."""

import itertools

import pytest
import torch

from mhmoe_ray.bench import checkpoints
from mhmoe_ray.bench.timing import Hardware
from tests.specs import tiny_spec


@pytest.mark.long
def test_all_is_timed_by_a_clock_that_waits_for_the_device(tmp_path, monkeypatch):
    """All durations come from the clock that waits for the device; otherwise work still running on a GPU would not
    count.

    The test replaces it by a clock that ticks once at each read.
    """
    asked, ticks = [], itertools.count()

    def clock(device):
        asked.append(device)
        return lambda: float(next(ticks))

    monkeypatch.setattr(checkpoints, "clock", clock)
    device = torch.device("cpu")
    found = checkpoints.measure(tiny_spec(), 2, tmp_path, Hardware(device, "here", 1))
    assert asked == [device]
    assert found.steps == found.beside == found.torch_save == [1.0, 1.0]
    assert found.committed == [3.0, 3.0]  # the step beside it reads it twice
