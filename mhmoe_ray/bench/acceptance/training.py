"""Throughput of whole training steps of plain experts and of MH-MoE, at two micro-batch sizes.

Each model is measured with dropless routing, and with static routing, which drops rows beyond an expert's capacity.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from mhmoe_ray.bench.acceptance.settings import PartCase, Rows, Settings, first_line
from mhmoe_ray.bench.measure import peak_bytes
from mhmoe_ray.bench.steps import PAPER_TOKENS_PER_SECOND, SMALL_SIZE, StepCase, matched_models
from mhmoe_ray.bench.timing import device_clock, time_interleaved
from mhmoe_ray.planner.presets import Size
from mhmoe_ray.planner.sizes import compute_sizes
from mhmoe_ray.spec import RunSpec

_PAPER_SIZE = Size(768, 12, 32000, 2048, steps=1000, micro_batches=1, micro_batch_size=16, precision="bfloat16")
"""Size of the models of the second MH-MoE paper (arXiv 2411.16205), with a micro-batch that fills a GPU of 80 GB."""


def compared_models(settings: Settings) -> dict[int, dict[str, RunSpec]]:
    """Return the specs of a dense model and of models with dropless routing, by micro-batch size and name."""
    toy_size = SMALL_SIZE._replace(d_model=96, layers=2, seq_len=8, vocab_size=64, micro_batches=1)
    size, heads = (toy_size, (2,)) if settings.is_toy else (_PAPER_SIZE, (2, 3))
    micro_batch_sizes = (1,) if settings.is_toy else (16, 1)
    models: dict[int, dict[str, RunSpec]] = {}
    for count in micro_batch_sizes:
        specs = matched_models(size._replace(micro_batch_size=count), heads)
        # The plain model has one expert per token, so the dense model has equal multiply-adds.
        dense = specs["SMoE"].model_copy(update={"model": specs["SMoE"].model.with_moe(None)})
        models[count] = {"dense": dense, **specs}
    return models


def name_suffix(micro_batch_size: int) -> str:
    """Return the end of the names of results for a micro-batch size."""
    return " at micro-batches of 1" if micro_batch_size == 1 else ""


def cases(settings: Settings) -> Iterator[PartCase]:
    """Yield a case for each micro-batch size: tokens per second, TFLOP/s, and ratios between step times of models."""
    for count, dropless_specs in compared_models(settings).items():
        specs: dict[str, RunSpec] = {}
        for name, spec in dropless_specs.items():
            specs[name] = spec
            if spec.model.moe is not None:
                static_moe = spec.model.moe.model_copy(update={"capacity_factor": 1.25})
                specs[f"{name}, static"] = spec.model_copy(update={"model": spec.model.with_moe(static_moe)})
        measure = partial(measure_steps, settings, specs, "SMoE", name_suffix(count))
        yield PartCase(f"micro-batches of {count}", measure)


def measure_steps(settings: Settings, specs: dict[str, RunSpec], reference: str, suffix: str = "") -> Rows:
    """Measure the training steps of several specs in turn, and yield ratios of their times to those of `reference`."""
    # By default torch compiles the blocks of eight different models at most.
    torch._dynamo.config.recompile_limit = 64
    steps, peaks = dict[str, Callable[[], object]](), dict[str, int]()
    for name, spec in specs.items():
        try:
            case = StepCase(spec, settings.torch_device)
            case.step()
            peaks[name] = peak_bytes(case.step, settings.torch_device)
            steps[name] = case.step
        except torch.OutOfMemoryError as error:
            yield {"name": f"{name}{suffix}", "skipped": first_line(error)}
    timings = time_interleaved(steps, settings.rounds, device_clock(settings.torch_device))
    rates = {name: specs[name].tokens_per_step / timing.median for name, timing in timings.items()}
    for name, rate in rates.items():
        flops = 6 * compute_sizes(specs[name].model).macs_per_token
        figures = {"ms": timings[name].median * 1e3, "peak_gb": peaks[name] / 1e9}
        yield {"name": f"{name}{suffix}", **figures, "tokens/s": rate, "TFLOP/s": rate * flops / 1e12}
    for name in rates:
        if name != reference and not name.endswith("static") and reference in rates:
            yield {"name": f"{name} to {reference}{suffix}", "times": rates[reference] / rates[name]}
        if f"{name}, static" in rates:
            published = "SMoE" if name == "SMoE" else "MH-MoE"
            dynamic_rate, static_rate = (PAPER_TOKENS_PER_SECOND[published, kind] for kind in ("dynamic", "static"))
            ratio = rates[name] / rates[f"{name}, static"]
            yield {
                "name": f"{name} static to dropless{suffix}",
                "times": ratio,
                "published": dynamic_rate / static_rate,
            }
