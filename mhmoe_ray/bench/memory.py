"""Bytes of one forward and backward pass: at the peak, and kept between the two.

Counted are bytes that torch's allocator gives out. What a library takes for itself, such as oneDNN's scratch space, is
not in them.
"""

import os
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile


class Footprint(NamedTuple):
    peak: int
    """The most that is allocated at one time, beyond what was there before: results, gradients and all between."""
    kept: int
    """What forward keeps for backward, weights aside."""


def footprint(layer: nn.Module, forward: Callable[[], Tensor], backward: Callable[[Tensor], None]) -> Footprint:
    """Of one pass; what it leaves allocated counts as well.

    Args:
        layer: whose weights are not counted as kept.
        forward: returns the output.
        backward: takes it.
    """
    kept: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in layer.parameters()}

    def keep(t: Tensor) -> Tensor:
        # The graph holds t until backward, so that no other tensor gets its address before.
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return t.detach()  # t itself may hold the graph that holds it, and would never be released

    def run() -> None:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = forward()
        backward(y)

    return Footprint(peak_bytes(run, next(layer.parameters()).device), sum(kept.values()))


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most that `run` has allocated at one time on the device, beyond what was there before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    return highest(_changes(run))


def _changes(run: Callable[[], object]) -> list[int]:
    """Bytes of each allocation on the CPU, and of each release as a negative number, in order of time."""
    # Read at the profiler's first use: without it, it announces its stages on stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    results = found.profiler.kineto_results if found.profiler else None
    assert results is not None
    events = sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return [e.nbytes() for e in events]


def highest(changes: Iterable[int]) -> int:
    """The highest sum on the way, from 0."""
    at = top = 0
    for change in changes:
        at += change
        top = max(top, at)
    return top
