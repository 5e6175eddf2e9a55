"""Measurement of all expert layers at one set of sizes: memory in a first pass, then time in interleaved rounds.

Memory is that of torch's allocator, without what libraries allocate themselves, such as oneDNN's scratch space.
"""

import os
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from mhmoe_ray.bench.layers import Layer, LayerCase, LayerShape, SkippedCase, has_masks, our_layers
from mhmoe_ray.bench.peers import peer_layers
from mhmoe_ray.bench.timing import Hardware, device_clock, time_interleaved
from mhmoe_ray.errors import SpecError
from mhmoe_ray.spec import MoESpec
from mhmoe_ray.spec.base import Precision


class Footprint(NamedTuple):
    """Memory of a forward and backward pass."""

    peak_bytes: int
    """Largest number of bytes allocated at one time, without those allocated before the pass."""
    saved_bytes: int
    """Bytes that the forward pass saves for the backward pass, without weights."""


def footprint(layer: nn.Module, forward: Callable[[], Tensor], backward: Callable[[Tensor], None]) -> Footprint:
    """Run one forward and backward pass, and return its memory, including memory that stays allocated after it."""
    saved_sizes: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in layer.parameters()}

    def record_storage(t: Tensor) -> Tensor:
        # An address identifies a storage here: the graph keeps each saved tensor alive until the backward pass, so no
        # other tensor gets its address. A storage that is saved twice therefore counts once.
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            saved_sizes[storage.data_ptr()] = storage.nbytes()
        # The graph saves a detached tensor, because `t` may refer to the graph itself. Such a reference cycle would
        # never be released.
        return t.detach()

    def run() -> None:
        with torch.autograd.graph.saved_tensors_hooks(record_storage, lambda t: t):
            y = forward()
        backward(y)

    return Footprint(peak_bytes(run, next(layer.parameters()).device), sum(saved_sizes.values()))


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Call `run`, and return the largest number of bytes allocated on the device at one time meanwhile.

    Bytes that were allocated before do not count.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        previous_bytes = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - previous_bytes
    return max(accumulate(_allocation_changes(run), initial=0))


def _allocation_changes(run: Callable[[], object]) -> list[int]:
    """Return the bytes of each allocation on the CPU during `run` in order of time; releases are negative."""
    # Without this variable, the profiler announces its stages on stderr. The profiler reads the variable at its first
    # use, so it is set before.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    results = profiler.profiler.kineto_results if profiler.profiler else None
    assert results is not None
    events = sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return [e.nbytes() for e in events]


STATIC_ROWS = 8192
"""Largest number of rows at which static routing is measured.

A mask of static routing has k N^2 values for N rows. With k = 2, a pass takes 3 GB at 8,192 rows, and about 64 times as
much at 65,536."""


class LayerRequest(NamedTuple):
    """Layers that `mhmoe bench layer` measures, their sizes, and the number of rounds."""

    shape: LayerShape
    heads: Sequence[int]
    dtype: Precision
    rounds: int
    kernels: Sequence[str] = ("auto",)
    static: bool = False
    peers: bool = False


class LayerFigures(NamedTuple):
    """Measurements of a forward and backward pass of one layer; memory is that of `Footprint`."""

    name: str
    moe: MoESpec | None
    package: str | None
    median: float
    seconds: list[float]
    """Seconds of a pass, one value per round."""
    peak_bytes: int
    saved_bytes: int | None
    is_extrapolated: bool = False
    """True if the values are extrapolated from fewer rows instead of measured."""


class Measurements(NamedTuple):
    """Measurements of the requested layers that can run, in the order of `our_layers`, and what was skipped."""

    figures: list[LayerFigures]
    skipped: list[SkippedCase]


def measure(request: LayerRequest, hardware: Hardware, report: Callable[[str], None]) -> Measurements:
    """Measure memory and time of every layer that can run; a layer that fails is skipped with the reason.

    Impossible sizes, and a failure of one of the first two layers, are SpecErrors.
    """
    device = hardware.device
    layers, skipped = requested_layers(request, device)
    report(f"{len(layers)} layers, {request.rounds} rounds")
    cases: list[LayerCase] = []
    footprints: list[Footprint] = []
    for layer in layers:
        try:
            case = LayerCase(layer, request.shape, request.dtype, device)
            # Kernels are compiled and chosen at their first call. An extra pass does this before the measurement,
            # because compiling would add to the measured memory.
            if device.type == "cuda":
                case.run()
            footprints.append(footprint(case.module, case.forward, case.backward))
        # Any exception is caught, because layers of other packages may raise any. `failure_reason` returns None for a
        # bug, which is then raised again.
        except Exception as error:
            reason = failure_reason(layer, error)
            if reason is None:
                raise
            # The first two layers are the dense one and the plain one. All ratios are relative to them, so neither can
            # be skipped.
            if len(cases) < 2:
                raise SpecError(f"layer {layer.name}", reason, "choose other sizes or kernels") from error
            skipped.append(SkippedCase(layer.name, reason))
        else:
            cases.append(case)
    # The measurement of memory has already run each case once, so no warm-up is needed.
    timings = time_interleaved(
        {c.layer.name: c.run for c in cases}, request.rounds, device_clock(device), warm_up=False
    )
    figures = [
        LayerFigures(
            name, moe, package, timings[name].median, timings[name].seconds, memory.peak_bytes, memory.saved_bytes
        )
        for (name, moe, _, package), memory in zip((case.layer for case in cases), footprints, strict=True)
    ]
    return Measurements(figures, skipped)


def requested_layers(request: LayerRequest, device: torch.device) -> tuple[list[Layer], list[SkippedCase]]:
    """Return the layers of a request to measure, and the layers and kernels that are skipped, with the reason.

    Static routing with more than `STATIC_ROWS` rows is skipped. The SpecErrors are those of `our_layers`.
    """
    shape = request.shape
    layers, skipped = our_layers(shape, request.heads, request.static, request.kernels, device, request.dtype)
    if request.peers:
        more_layers, skipped_peers = peer_layers(shape, device)
        layers, skipped = layers + more_layers, skipped + skipped_peers
    excess_rows = {
        layer.name: rows
        for layer in layers
        if has_masks(layer.moe) and (rows := row_count(layer.moe, shape)) > STATIC_ROWS
    }
    reason = f"its masks grow with the square of the rows; it is measured up to {STATIC_ROWS:,}"
    skipped += [SkippedCase(name, f"{rows:,} rows: {reason}") for name, rows in excess_rows.items()]
    return [layer for layer in layers if layer.name not in excess_rows], skipped


def row_count(moe: MoESpec | None, shape: LayerShape) -> int:
    """Return the number of rows N that a layer sends to experts."""
    return shape.tokens * (moe.heads if moe else 1)


def failure_reason(layer: Layer, error: Exception) -> str | None:
    """Return the reason in one line why a layer cannot run, from the error that it raised; None if the error is a bug.

    Reasons are too little memory, any error of another package's layer, and a ValueError with a kernel that the request
    names, because kernels refuse sizes in this way.
    """
    is_kernel_named = layer.moe is not None and layer.moe.kernel != "auto"
    if (
        layer.package
        or isinstance(error, torch.OutOfMemoryError)
        or (is_kernel_named and isinstance(error, ValueError))
    ):
        message = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        first_line, _, _ = message.removeprefix("Value error, ").strip().partition("\n")
        return f"{type(error).__name__}: {first_line}" if layer.package else first_line
    return None


def as_json(figures: Sequence[LayerFigures]) -> list[dict[str, Any]]:
    """Return the measurements as JSON data, with ratios to the first two layers, the dense and the plain one."""
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
            "peak": f.peak_bytes,
            "kept_for_backward": f.saved_bytes,
            "extrapolated": f.is_extrapolated,
        }
        for f in figures
    ]
