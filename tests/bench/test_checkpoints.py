"""Measuring how long a checkpoint holds training up."""

import itertools

import pytest
import torch

from mhmoe_ray.bench import checkpoints
from mhmoe_ray.bench.timing import Hardware
from tests.specs import tiny_spec


@pytest.mark.long
def test_all_is_timed_by_a_clock_that_waits_for_the_device(tmp_path, monkeypatch):
    """One that ticks when it is read: of a card's own clock, work that goes on there would be no part."""
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
