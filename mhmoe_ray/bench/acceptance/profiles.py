"""CUDA kernels of expert layers by their time on the GPU, to explain a measured value that misses its prediction."""

from collections.abc import Iterator
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

from mhmoe_ray.bench.acceptance.layers import make_tokens
from mhmoe_ray.bench.acceptance.settings import PartCase, Rows, Settings
from mhmoe_ray.bench.layers import build_mixture
from mhmoe_ray.spec import MoESpec


def cases(settings: Settings) -> Iterator[PartCase]:
    """Yield a case for each layer: the CUDA kernels that take the most time, with their number of launches.

    The layer's kernel is `auto`. On a CPU, the times are of torch's operators.
    """
    for name, moe in settings.layers.items():
        yield PartCase(name, partial(_profile, settings, name, moe))


def _profile(settings: Settings, name: str, moe: MoESpec) -> Rows:
    is_cuda = settings.device == "cuda"
    activity = ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU
    module = build_mixture(settings.layer_width, moe).to(settings.torch_device)
    x_BTM = make_tokens(settings, settings.layer_tokens[-1])
    for is_measured in (False, True):
        with profile(activities=[activity]) as profiler:
            with torch.autocast(settings.device, torch.bfloat16):
                y_BTM, _ = module(x_BTM)
            y_BTM.backward(torch.ones_like(y_BTM))
            if is_cuda:
                torch.cuda.synchronize()
        if not is_measured:
            continue
        times = {
            event.key: (event.self_device_time_total if is_cuda else event.self_cpu_time_total, event.count)
            for event in profiler.key_averages()
        }
        for kernel, (microseconds, count) in sorted(times.items(), key=lambda item: -item[1][0])[:12]:
            yield {"name": f"{name}: {kernel[:80]}", "ms": microseconds / 1e3, "launches": count}
