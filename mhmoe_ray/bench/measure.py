"""All layers at one shape: memory of a first pass, then interleaved rounds of time.

Counted are bytes that torch's allocator gives out. What a library takes for itself, such as oneDNN's scratch space, is
not in them.
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


STATIC_ROWS = 8192
"""Rows up to which static routing is measured. Its masks have k N^2 values each: with k = 2 a pass takes 3 GB at 8,192
rows, and some 64 times that at 65,536."""


class Request(NamedTuple):
    shape: Shape
    heads: Sequence[int]
    """h of the multi-head layers."""
    dtype: DTypeName
    rounds: int
    kernels: Sequence[str] = ("auto",)
    static: bool = False
    peers: bool = False


class Figures(NamedTuple):
    """Of one layer; of a forward and backward pass."""

    name: str
    moe: MoESpec | None
    """None: the dense layer."""
    package: str | None
    """Whose layer it is; None: ours."""
    median: float
    """Seconds."""
    seconds: list[float]
    """One for each round."""
    peak: int
    """Bytes, as `Footprint`."""
    kept: int | None
    extrapolated: bool = False
    """Not measured, but drawn on from what was at fewer rows."""


class Measured(NamedTuple):
    figures: list[Figures]
    """The dense layer first, then the plain one."""
    absent: list[Absent]


def measure(request: Request, hardware: Hardware, note: Callable[[str], None]) -> Measured:
    """Measure every layer that can run.

    Args:
        request: which layers.
        hardware: where.
        note: is told in a line what comes.

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
    """The layers of a request; those that are left out, and why."""
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
    """N: tokens, or sub-tokens."""
    return shape.tokens * (moe.heads if moe else 1)


def cannot(layer: Layer, error: Exception) -> str | None:
    """Why a layer cannot run here, in one line, of an error that says so; None for an error that is a bug of ours.

    Of another package's layer every error is a reason. A kernel that was named refuses sizes with a ValueError.
    """
    named = layer.moe is not None and layer.moe.kernel != "auto"
    if layer.package or isinstance(error, torch.OutOfMemoryError) or (named and isinstance(error, ValueError)):
        said = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        first, _, _ = said.removeprefix("Value error, ").strip().partition("\n")
        return f"{type(error).__name__}: {first}" if layer.package else first
    return None


def as_json(figures: Sequence[Figures]) -> list[dict[str, Any]]:
    """With ratios to the first two, the dense and the plain layer."""
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
