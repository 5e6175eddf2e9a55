"""Throughput of whole training steps of plain experts and of MH-MoE, at two micro-batch sizes.

Each model is measured with dropless routing, and with static routing, which drops rows beyond an expert's capacity.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from mhmoe_ray.bench.acceptance.settings import PartCase, Rows, Settings, first_line
from mhmoe_ray.bench.steps import PAPER_TOKENS_PER_SECOND, SMALL_SIZE, StepCase, matched_models
from mhmoe_ray.bench.timing import device_clock, time_interleaved
from mhmoe_ray.planner.presets import Size
from mhmoe_ray.planner.sizes import compute_sizes
from mhmoe_ray.spec import RunSpec

_PAPER_SIZE = Size(768, 12, 32000, 2048, steps=1000, micro_batches=1, micro_batch_size=16, precision="bfloat16")
"""Size of the models of the second MH-MoE paper (arXiv 2411.16205), with a micro-batch that fills a GPU of 80 GB."""


def compared_models(settings: Settings) -> dict[int, dict[str, RunSpec]]:
    """Return the specs of models with dropless routing, by micro-batch size and name."""
    toy_size = SMALL_SIZE._replace(d_model=96, layers=2, seq_len=8, vocab_size=64, micro_batches=1)
    size, heads = (toy_size, (2,)) if settings.is_toy else (_PAPER_SIZE, (2, 3))
    micro_batch_sizes = (1,) if settings.is_toy else (16, 1)
    return {count: matched_models(size._replace(micro_batch_size=count), heads) for count in micro_batch_sizes}


def name_suffix(micro_batch_size: int) -> str:
    """Return the end of the names of results for a micro-batch size."""
    return " at micro-batches of 1" if micro_batch_size == 1 else ""


def cases(settings: Settings) -> Iterator[PartCase]:
    """Yield a case for each micro-batch size: tokens per second, TFLOP/s, and ratios between step times of models."""
    for count, specs in compared_models(settings).items():
        yield PartCase(f"micro-batches of {count}", partial(_measure, settings, name_suffix(count), specs))


def _measure(settings: Settings, suffix: str, dropless_specs: dict[str, RunSpec]) -> Rows:
    specs: dict[str, RunSpec] = {}
    for name, spec in dropless_specs.items():
        specs[name] = spec
        assert spec.model.moe is not None
        static_moe = spec.model.moe.model_copy(update={"capacity_factor": 1.25})
        specs[f"{name}, static"] = spec.model_copy(update={"model": spec.model.with_moe(static_moe)})
    training_cases: dict[str, StepCase] = {}
    for name, spec in specs.items():
        try:
            case = StepCase(spec, settings.torch_device)
            case.step()
            training_cases[name] = case
        except torch.OutOfMemoryError as error:
            yield {"name": f"{name}{suffix}", "skipped": first_line(error)}
    steps: dict[str, Callable[[], object]] = {name: case.step for name, case in training_cases.items()}
    timings = time_interleaved(steps, settings.rounds, device_clock(settings.torch_device))
    rates = {name: specs[name].tokens_per_step / timing.median for name, timing in timings.items()}
    for name, rate in rates.items():
        flops = 6 * compute_sizes(specs[name].model).macs_per_token
        yield {"name": f"{name}{suffix}", "tokens/s": rate, "TFLOP/s": rate * flops / 1e12}
    for name in specs:
        if name not in ("SMoE", "SMoE, static") and not name.endswith("static") and name in rates and "SMoE" in rates:
            yield {"name": f"{name} to SMoE{suffix}", "times": rates["SMoE"] / rates[name]}
        if f"{name}, static" in rates and name in rates:
            published = "SMoE" if name == "SMoE" else "MH-MoE"
            dynamic_rate, static_rate = (PAPER_TOKENS_PER_SECOND[published, kind] for kind in ("dynamic", "static"))
            ratio = rates[name] / rates[f"{name}, static"]
            yield {
                "name": f"{name} static to dropless{suffix}",
                "times": ratio,
                "published": dynamic_rate / static_rate,
            }
