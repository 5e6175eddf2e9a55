"""Predictions for one H100, computed from the work of the code at hand; the report shows them beside the results.

A layer's time is the sum of the times of its FLOPs, of its bytes and of its kernels, each at the ceiling in `goals.py`,
so it is likely to be too short. A training step's time is the planner's estimate at the same ceilings.
"""

from collections.abc import Iterator
from functools import partial

import torch

from mhmoe_kernels.choice import gpu_kernels
from mhmoe_ray.bench.acceptance.accounting import count_pass
from mhmoe_ray.bench.acceptance.defaults import step_specs
from mhmoe_ray.bench.acceptance.goals import BANDWIDTH, LAUNCH_SECONDS, PEAK_FLOPS
from mhmoe_ray.bench.acceptance.layers import expert_sizes, layer_flops, name_suffix
from mhmoe_ray.bench.acceptance.settings import PartCase, Rows, Settings
from mhmoe_ray.bench.acceptance.training import compared_models
from mhmoe_ray.bench.acceptance.training import name_suffix as training_suffix
from mhmoe_ray.planner.estimate import estimate_step_time
from mhmoe_ray.planner.kernels import ASSUMED_MAJOR
from mhmoe_ray.planner.placement import single_node_layout
from mhmoe_ray.spec import MoESpec, RunSpec


def cases(settings: Settings) -> Iterator[PartCase]:
    """Yield the only case: times and kernels of layers, times of steps, and ratios of both."""
    yield PartCase("counted work", partial(_predict, settings))


def _predict(settings: Settings) -> Rows:
    for tokens in settings.layer_tokens:
        suffix = name_suffix(settings, tokens)
        seconds: dict[str, float] = {}
        for name, moe in settings.layers.items():
            # `auto` chooses the first kernel. The last one is `grouped`, which cannot be counted without values.
            *kernels, _ = gpu_kernels("training", ASSUMED_MAJOR, expert_sizes(settings, moe))
            seconds_by_kernel = {k: predict_layer_seconds(settings, moe, k, tokens) for k in kernels}
            seconds[name] = seconds_by_kernel[kernels[0]]
            yield {"name": f"layers: {name}{suffix}", "ms": seconds[name] * 1e3}
            for kernel in kernels:
                yield {"name": f"layers: {name}, {kernel}{suffix}", "ms": seconds_by_kernel[kernel] * 1e3}
                if tokens == settings.layer_tokens[0]:
                    launches = count_pass(settings, moe, kernel, tokens).kernels.total()
                    yield {"name": f"waits: {name}, {kernel}", "kernels": launches}
            if name != "SMoE":
                yield {"name": f"layers: {name} to SMoE{suffix}", "times": seconds[name] / seconds["SMoE"]}
    for name, spec in step_specs(settings).items():
        yield {"name": f"defaults: {name}", "ms": predict_step_seconds(spec) * 1e3}
    for count, specs in compared_models(settings).items():
        step_seconds = {name: predict_step_seconds(spec) for name, spec in specs.items()}
        for name in specs:
            if name != "SMoE":
                ratio = step_seconds[name] / step_seconds["SMoE"]
                yield {"name": f"training: {name} to SMoE{training_suffix(count)}", "times": ratio}


def predict_layer_seconds(settings: Settings, moe: MoESpec, kernel: str, tokens: int) -> float:
    """Return the predicted time of a forward and backward pass of a layer with weights in bfloat16."""
    counts = count_pass(settings, moe, kernel, tokens, torch.bfloat16)
    flops = layer_flops(settings, moe, tokens)
    return flops / PEAK_FLOPS + counts.bytes.total() / BANDWIDTH + counts.kernels.total() * LAUNCH_SECONDS


def predict_step_seconds(spec: RunSpec) -> float:
    """Return the planner's estimate of a training step on one GPU at the ceilings."""
    ceilings = {"bfloat16_flops": PEAK_FLOPS, "memory_bandwidth": BANDWIDTH, "launch_seconds": LAUNCH_SECONDS}
    accelerator = spec.cluster.accelerator.model_copy(update={**ceilings, "flops_share": 1.0, "memory_share": 1.0})
    cluster = spec.cluster.model_copy(update={"gpus_per_worker": 1, "accelerator": accelerator})
    spec_on_gpu = spec.model_copy(update={"cluster": cluster})
    return estimate_step_time(spec_on_gpu, single_node_layout(1, 1)).sequential_seconds
