"""Counts of the host's waits for the GPU in an expert layer, and of the CUDA kernels that the layer launches."""

import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from mhmoe_ray.bench.acceptance.accounting import count_pass, run_pass
from mhmoe_ray.bench.acceptance.layers import kernels_of, make_tokens, with_kernel
from mhmoe_ray.bench.acceptance.settings import PartCase, Rows, Settings, first_line
from mhmoe_ray.bench.layers import build_mixture
from mhmoe_ray.spec import MoESpec

EXTRA_KERNELS = 8
"""Number of CUDA kernels that a layer may launch beyond its count on fake tensors, such as copies inside torch."""


def cases(settings: Settings) -> Iterator[PartCase]:
    """Yield a case for each layer and kernel: waits of the host and CUDA kernels in a forward and backward pass."""
    for name, moe in settings.layers.items():
        for kernel in kernels_of(settings, moe):
            yield PartCase(f"{name}, {kernel}", partial(_measure, settings, name, moe, kernel))


def _measure(settings: Settings, name: str, moe: MoESpec, kernel: str) -> Rows:
    tokens = settings.layer_tokens[0]
    module = build_mixture(settings.layer_width, with_kernel(moe, kernel)).to(settings.torch_device)
    x_BTM = make_tokens(settings, tokens)
    run_pass(module, x_BTM)  # compiles the kernels
    counts = _count(settings, module, x_BTM)
    # Kernel `grouped` is measured only for comparison and cannot fail, because with it the host must wait until the
    # rows of each expert are counted.
    if kernel != "grouped":
        try:
            counts["limit"] = count_pass(settings, moe, kernel, tokens).kernels.total() + EXTRA_KERNELS
            if settings.device == "cuda":
                counts["passed"] = counts["waits"] == 0 and counts["kernels"] <= counts["limit"]
        # A layer that cannot be counted without values must not hide what was measured.
        except Exception as error:
            counts |= {"passed": False, "error": first_line(error)}
    yield {"name": f"{name}, {kernel}", **counts}


def _count(settings: Settings, module: torch.nn.Module, x_BTM: torch.Tensor) -> dict[str, Any]:
    if settings.device == "cpu":
        run_pass(module, x_BTM)
        return {"skipped": "only a GPU is waited for"}
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as recorded_warnings:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run_pass(module, x_BTM)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # torch also warns that this mode is a prototype, so only warnings about waits count.
    waits = [str(w.message) for w in recorded_warnings if "synchronizing CUDA operation" in str(w.message)]
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run_pass(module, x_BTM)
        torch.cuda.synchronize()
    kernels = sum(event.count for event in profiler.key_averages() if event.self_device_time_total > 0)
    return {"waits": len(waits), "kernels": kernels, "first_wait": waits[0][:200] if waits else None}
