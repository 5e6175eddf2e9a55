"""Measurement of all layers at one shape: memory of a first pass, then interleaved rounds of time.

Memory means the bytes that torch's allocator gives out. It leaves out what a library allocates itself, such as oneDNN's
scratch space.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from mhmoe_ray.bench.layers import Absent, Case, DTypeName, Layer, Shape, has_masks, our_layers
from mhmoe_ray.bench.peers import peer_layers
from mhmoe_ray.bench.timing import Hardware, clock, interleaved
from mhmoe_ray.errors import SpecError
from mhmoe_ray.spec import MoESpec


class Footprint(NamedTuple):
    peak: int
    """Largest number of bytes allocated at one time, beyond those before the pass: results, gradients and
    intermediates."""
    kept: int
    """Bytes that the forward pass keeps for the backward pass, weights excluded."""


def footprint(layer: nn.Module, forward: Callable[[], Tensor], backward: Callable[[Tensor], None]) -> Footprint:
    """Measure the memory of one pass; what the pass leaves allocated counts as well.

    Args:
        layer: the layer, whose weights are not counted as kept.
        forward: a function that returns the output.
        backward: a function that takes the output.
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
    """Return the largest number of bytes that `run` has allocated at one time on the device, beyond those before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    return highest(_changes(run))


def _changes(run: Callable[[], object]) -> list[int]:
    """Return the bytes of each allocation on the CPU, and of each release as a negative number, in order of time."""
    # Read at the profiler's first use: without it, it announces its stages on stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    results = found.profiler.kineto_results if found.profiler else None
    assert results is not None
    events = sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return [e.nbytes() for e in events]


def highest(changes: Iterable[int]) -> int:
    """Return the highest partial sum of the changes, starting from 0."""
    at = top = 0
    for change in changes:
        at += change
        top = max(top, at)
    return top


STATIC_ROWS = 8192
"""Number of rows up to which static routing is measured.

Its masks have k N^2 values each: with k = 2 a pass takes 3 GB at 8,192 rows, and some 64 times that at 65,536.
"""


class Request(NamedTuple):
    shape: Shape
    heads: Sequence[int]
    """Numbers of heads h of the multi-head layers."""
    dtype: DTypeName
    rounds: int
    kernels: Sequence[str] = ("auto",)
    static: bool = False
    peers: bool = False


class Figures(NamedTuple):
    """Measurements of a forward and backward pass of one layer."""

    name: str
    moe: MoESpec | None
    """Sizes of the mixture of experts; None for the dense layer."""
    package: str | None
    """Package that the layer comes from, with its version; None for ours."""
    median: float
    """Median time of a pass in seconds."""
    seconds: list[float]
    """Seconds of a pass, one value per round."""
    peak: int
    """Peak memory in bytes, as in `Footprint`."""
    kept: int | None
    extrapolated: bool = False
    """Whether the values are not measured but extrapolated from those at fewer rows."""


class Measured(NamedTuple):
    figures: list[Figures]
    """Figures of each layer, the dense layer first, then the plain one."""
    absent: list[Absent]


def measure(request: Request, hardware: Hardware, note: Callable[[str], None]) -> Measured:
    """Measure every layer that can run.

    Args:
        request: the layers to measure.
        hardware: the device to measure on.
        note: a function that is called with a line about what comes next.

    Raises:
        SpecError: a layer of these sizes cannot be made, or the first two do not fit into memory.
    """
    device = hardware.device
    layers, absent = wanted(request, device)
    note(f"{len(layers)} layers, {request.rounds} rounds")
    cases: list[Case] = []
    footprints: list[Footprint] = []
    for layer in layers:
        try:
            case = Case(layer, request.shape, request.dtype, device)
            if device.type == "cuda":
                case.run()  # kernels are compiled and chosen at their first call, which takes memory of its own
            footprints.append(footprint(case.module, case.forward, case.backward))
        except Exception as error:
            why = cannot(layer, error)
            if why is None:
                raise
            if len(cases) < 2:
                raise SpecError(f"layer {layer.name}", why, "choose other sizes or kernels") from error
            absent.append(Absent(layer.name, why))
        else:
            cases.append(case)
    timings = interleaved({c.layer.name: c.run for c in cases}, request.rounds, clock(device), warm_up=False)
    figures = [
        Figures(name, moe, package, timings[name].median, timings[name].seconds, found.peak, found.kept)
        for (name, moe, _, package), found in zip((case.layer for case in cases), footprints, strict=True)
    ]
    return Measured(figures, absent)


def wanted(request: Request, device: torch.device) -> tuple[list[Layer], list[Absent]]:
    """Return the layers of a request, and those that are left out with the reason."""
    shape = request.shape
    layers, absent = our_layers(shape, request.heads, request.static, request.kernels, device, request.dtype)
    if request.peers:
        more, missing = peer_layers(shape)
        layers, absent = layers + more, absent + missing
    many = {
        layer.name: rows
        for layer in layers
        if has_masks(layer.moe) and (rows := rows_of(layer.moe, shape)) > STATIC_ROWS
    }
    why = f"its masks grow with the square of the rows; it is measured up to {STATIC_ROWS:,}"
    absent += [Absent(name, f"{rows:,} rows: {why}") for name, rows in many.items()]
    return [layer for layer in layers if layer.name not in many], absent


def rows_of(moe: MoESpec | None, shape: Shape) -> int:
    """Return the number of rows N of a layer: its tokens, or its sub-tokens."""
    return shape.tokens * (moe.heads if moe else 1)


def cannot(layer: Layer, error: Exception) -> str | None:
    """Return in one line why a layer cannot run here, from an error that says so; None if the error is a bug.

    For a layer of another package every error is a reason. A kernel that was named refuses sizes with a ValueError.
    """
    named = layer.moe is not None and layer.moe.kernel != "auto"
    if layer.package or isinstance(error, torch.OutOfMemoryError) or (named and isinstance(error, ValueError)):
        said = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        first, _, _ = said.removeprefix("Value error, ").strip().partition("\n")
        return f"{type(error).__name__}: {first}" if layer.package else first
    return None


def as_json(figures: Sequence[Figures]) -> list[dict[str, Any]]:
    """Return the figures as JSON, with ratios to the first two of them, the dense and the plain layer."""
    dense, plain = (f.median for f in figures[:2])
    return [
        {
            "layer": f.name,
            "package": f.package,
            "spec": f.moe.model_dump(mode="json") if f.moe else None,
            "seconds": f.seconds,
            "median": f.median,
            "to_dense": f.median / dense,
            "to_smoe": f.median / plain,
            "peak": f.peak,
            "kept_for_backward": f.kept,
            "extrapolated": f.extrapolated,
        }
        for f in figures
    ]
