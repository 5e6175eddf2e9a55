"""Test of the timer of a GPU's waits, with fake events whose times are known in place of CUDA events."""

import itertools

import pytest
import torch

from mhmoe_ray.distributed.dispatch import exchange
from mhmoe_ray.distributed.dispatch.exchange import GPU_WAITS_PER_SAMPLE, WaitTimer


class Event:
    """Event whose time is the number of events recorded before it, in milliseconds."""

    numbers = itertools.count()

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.time = next(self.numbers)

    def synchronize(self):
        pass

    def elapsed_time(self, end_event):
        return end_event.time - self.time


def test_a_sample_of_a_gpus_waits_stands_for_all(monkeypatch):
    """Each measured wait takes a millisecond, and the timer's estimate for all waits assumes the same of the others."""
    monkeypatch.setattr(exchange, "_cuda_event", Event)
    timer = WaitTimer()
    for waits in (1, 40, 3 * GPU_WAITS_PER_SAMPLE):
        first_number = next(Event.numbers)
        for _ in range(waits):
            with timer.measure(torch.device("cuda")):
                pass
        assert timer.pop_seconds() == pytest.approx(waits / 1000)
        measured_waits = (next(Event.numbers) - first_number - 1) // 2
        assert measured_waits == -(-waits // GPU_WAITS_PER_SAMPLE)
    assert timer.pop_seconds() == 0
