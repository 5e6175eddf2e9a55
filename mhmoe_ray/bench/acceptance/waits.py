"""Counts of the host's waits for the GPU in an expert layer, and of the CUDA kernels that the layer launches."""

import warnings
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from mhmoe_ray.bench.acceptance.layers import kernels_of, make_layer, make_tokens
from mhmoe_ray.bench.acceptance.settings import Rows, Settings

MAX_KERNELS = 64
"""Largest number of CUDA kernels that the forward and backward pass of a layer may launch."""


def run(settings: Settings) -> Rows:
    """Yield how often the host waits and how many CUDA kernels run in a pass of each layer with each expert kernel.

    A pass is forward and backward.
    """
    tokens = settings.layer_tokens[0]
    for name, size in settings.layers.items():
        for kernel in kernels_of(settings, size):
            module, x_BTM = make_layer(settings, size, kernel), make_tokens(settings, tokens)
            _pass(settings, module, x_BTM)  # compiles the kernels
            counts = _count(settings, module, x_BTM)
            # Kernel `grouped` is measured only for comparison and cannot fail, because with it the host must wait until
            # the rows of each expert are counted.
            if settings.device == "cuda" and kernel != "grouped":
                counts["passed"] = counts["waits"] == 0 and counts["kernels"] <= MAX_KERNELS
            yield {"name": f"{name}, {kernel}", **counts}


def _pass(settings: Settings, module: torch.nn.Module, x_BTM: torch.Tensor) -> None:
    # Old gradients are dropped, because adding to them would launch kernels that do not belong to the layer.
    for leaf in (x_BTM, *module.parameters()):
        leaf.grad = None
    with torch.autocast(settings.device, torch.bfloat16):
        y_BTM, routing = module(x_BTM)
    outputs = (y_BTM, routing.balance_loss, routing.z_loss)
    torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])


def _count(settings: Settings, module: torch.nn.Module, x_BTM: torch.Tensor) -> dict[str, Any]:
    if settings.device == "cpu":
        _pass(settings, module, x_BTM)
        return {"skipped": "only a GPU is waited for"}
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as recorded_warnings:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            _pass(settings, module, x_BTM)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # torch also warns that this mode is a prototype, so only warnings about waits count.
    waits = [str(w.message) for w in recorded_warnings if "synchronizing CUDA operation" in str(w.message)]
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        _pass(settings, module, x_BTM)
        torch.cuda.synchronize()
    kernels = sum(event.count for event in profiler.key_averages() if event.self_device_time_total > 0)
    # Three of the kernels do not belong to the layer: they fill the gradients of its three outputs with ones.
    return {"waits": len(waits), "kernels": kernels - 3, "first_wait": waits[0][:200] if waits else None}
