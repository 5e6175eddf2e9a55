"""Measurements that others published, beside our estimates: `python -m tests.measured` writes planner/MEASURED.md."""

import math
import statistics
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from mhmoe_ray.api.placement import planned_placement
from mhmoe_ray.planner.adapt import valid_changes
from mhmoe_ray.planner.estimate import Estimate, estimate_step_time
from mhmoe_ray.planner.memory import compute_memory
from mhmoe_ray.planner.search import MEMORY_SHARE
from mhmoe_ray.spec import RunSpec

PAGE = Path(__file__).parents[1] / "mhmoe_ray" / "planner" / "MEASURED.md"
SOURCES = {
    "Automodel": "https://docs.nvidia.com/nemo/automodel/latest/performance/performance-summary.md",
    "torchtitan": "https://github.com/pytorch/torchtitan/blob/31a17bf/benchmarks/llama3_h100_202412_torchtitan.md",
}
HBM2E = {"name": "H100 HBM2e, 500 W", "memory": 96e9, "memory_bandwidth": 2.4e12}
"""torchtitan's H100, whose clock under its limit of 500 W is not published; the peak is taken to be that of 700 W."""

LLAMA = {"backbone": "llama", "vocab_size": 128_256, "tied_embeddings": False, "kv_heads": 8, "moe": None}
LLAMA_8B = LLAMA | {"d_model": 4096, "layers": 32, "attention_heads": 32, "d_ff": 14_336}
LLAMA_70B = LLAMA | {"d_model": 8192, "layers": 80, "attention_heads": 64, "d_ff": 28_672}
QWEN3_30B = {
    **{"vocab_size": 151_936, "d_model": 2048, "layers": 48, "attention_heads": 32, "kv_heads": 4, "d_head": 128},
    **{"qk_norm": "head", "tied_embeddings": False},
    "moe": {"heads": 1, "experts": 128, "top_k": 8, "d_expert": 768, "every": 1, "normalize_gates": True},
}
GPT_OSS = {
    "vocab_size": 201_088,
    "d_model": 2880,
    "attention_heads": 64,
    "kv_heads": 8,
    "d_head": 64,
    "tied_embeddings": False,
}
GPT_OSS_EXPERTS = {"heads": 1, "top_k": 4, "d_expert": 2880, "every": 1, "normalize_gates": True}
GPT_OSS_20B = GPT_OSS | {"layers": 24, "moe": GPT_OSS_EXPERTS | {"experts": 32}}
GPT_OSS_120B = GPT_OSS | {"layers": 36, "moe": GPT_OSS_EXPERTS | {"experts": 128}}


MEMORY_KEYS = ("train.recompute", "train.moment_precision", "train.loss_chunk_rows", "cluster.reduce_after")
SHARDING = ("cluster.ep", "cluster.shard_experts")
VALUES: dict[str, tuple[Any, ...]] = {
    "train.recompute": ("none", "experts", "exchange", "block"),
    "train.moment_precision": ("float32", "bfloat16"),
    "train.loss_chunk_rows": (1024, 128),
    "cluster.reduce_after": ("step", "micro_batch"),
    "cluster.ep": (1, 2, 4, 8, 16, 32, 64),
    "cluster.shard_experts": (False, True),
}


class Measurement(NamedTuple):
    """Published time of a step, with the settings that its source states."""

    name: str
    source: str
    model: dict[str, Any]
    nodes: int
    sequences: int
    micro_batch: int
    seq_len: int
    seconds: float
    remark: str
    """What the source states and a spec cannot express."""
    cluster: Mapping[str, Any] = MappingProxyType({})
    open_keys: tuple[str, ...] = MEMORY_KEYS
    """Keys that the source does not state. They get the values with the shortest estimated step that fit."""
    is_fitted: bool = False
    """True if the two factors are fitted on this measurement; they are tested on the others."""


MEASUREMENTS = [
    Measurement(
        "Qwen3 MoE 30B", "Automodel", QWEN3_30B, 1, 512, 4, 4096, 21.773, "", {"ep": 8}, is_fitted=True
    ),
    Measurement(
        "GPT-OSS 20B", "Automodel", GPT_OSS_20B, 1, 256, 2, 4096, 10.04,
        "every other layer attends to 128 tokens, here to all",
        open_keys=(*SHARDING, *MEMORY_KEYS),
    ),
    Measurement(
        "GPT-OSS 120B", "Automodel", GPT_OSS_120B, 8, 512, 2, 4096, 4.30, "the same",
        open_keys=(*SHARDING, *MEMORY_KEYS),
    ),
    Measurement(
        "Llama3 70B", "Automodel", LLAMA_70B, 8, 256, 1, 4096, 18.90,
        "two GPUs share each sequence of 8,192 tokens; here each has its own of 4,096", {"shard_group": 32},
    ),
    Measurement(
        "Llama 3.1 8B", "torchtitan", LLAMA_8B, 1, 16, 2, 8192, 16 * 8192 / (8 * 6667),
        "some operations are recomputed, here none; the peak at 500 W is unknown", {"accelerator": HBM2E}, (),
        is_fitted=True,
    ),
    Measurement(
        "Llama 3.1 8B", "torchtitan", LLAMA_8B, 16, 256, 2, 8192, 256 * 8192 / (128 * 6514), "the same",
        {"accelerator": HBM2E}, (),
    ),
]  # fmt: skip


def planned_spec(measurement: Measurement, kernels: float = 1.0, links: float = 1.0) -> RunSpec:
    """Return the spec of a measurement, whose kernels and links reach these multiples of the assumed shares of peaks.

    The keys that the source leaves open get the values with the shortest estimated step that fit.
    """
    stated_spec = _stated_spec(measurement, kernels, links)
    choices = product(*(VALUES[key] for key in measurement.open_keys))
    changes = (dict(zip(measurement.open_keys, choice, strict=True)) for choice in choices)
    limit = MEMORY_SHARE * stated_spec.cluster.accelerator.memory
    specs = [spec for _, spec in valid_changes(stated_spec, changes)]
    fitting_specs = [spec for spec in specs if compute_memory(spec).total <= limit] if measurement.open_keys else specs
    return min(fitting_specs, key=lambda spec: middle(estimate(spec, measurement.nodes)))


def _stated_spec(measurement: Measurement, kernels: float, links: float) -> RunSpec:
    tree = {
        "name": "measured",
        "model": measurement.model,
        "data": {"sources": {"text": {"path": "text"}}, "prepared": "prepared", "seq_len": measurement.seq_len},
        "train": {
            "steps": 1, "lr": 1e-4, "precision": "bfloat16", "residual_precision": "bfloat16", "compile": True,
            "micro_batches": measurement.sequences // measurement.micro_batch, "loss_chunk_rows": 1024,
            "micro_batch_size": measurement.micro_batch,
        },
        "cluster": {
            "workers": 8 * measurement.nodes, "gpus_per_worker": 1, "strategy": "fsdp", "gather_precision": "bfloat16",
            **measurement.cluster,
        },
    }  # fmt: skip
    spec = RunSpec.model_validate(tree)
    accelerator, network = spec.cluster.accelerator, spec.cluster.network
    shares = {
        "flops_share": accelerator.flops_share * kernels,
        "memory_share": min(1.0, accelerator.memory_share * kernels),
    }
    faster = {
        "accelerator": accelerator.model_copy(update=shares),
        "network": network.model_copy(update={"share": network.share * links}),
    }
    return spec.model_copy(update={"cluster": spec.cluster.model_copy(update=faster)})


def estimate(spec: RunSpec, nodes: int) -> Estimate:
    layout = planned_placement(spec, nodes, 8).layout
    assert layout is not None
    return estimate_step_time(spec, layout)


def middle(step: Estimate) -> float:
    """Return the middle of an estimate's interval in seconds."""
    return (step.overlapped_seconds + step.sequential_seconds) / 2


def ratio(measurement: Measurement, kernels: float = 1.0, links: float = 1.0) -> float:
    """Return the middle of the estimate over the measured seconds."""
    return middle(estimate(planned_spec(measurement, kernels, links), measurement.nodes)) / measurement.seconds


def fitted_factors() -> tuple[float, float]:
    """Return the factors for kernels and links with which the fitted measurements are nearest."""
    grid = product([0.8 + 0.05 * i for i in range(11)], (0.5, 0.75, 1.0, 1.25))
    fitted = [measurement for measurement in MEASUREMENTS if measurement.is_fitted]
    return min(grid, key=lambda factors: sum(math.log(ratio(m, *factors)) ** 2 for m in fitted))


def page() -> str:
    """Return the text of planner/MEASURED.md."""
    factors = fitted_factors()
    rows = []
    for m in MEASUREMENTS:
        spec = planned_spec(m)
        step = estimate(spec, m.nodes)
        tree = spec.model_dump(mode="json")
        open_values = [
            f"{key.partition('.')[2]} {tree[key.partition('.')[0]][key.partition('.')[2]]}" for key in m.open_keys
        ]
        cells = [
            m.name, m.source, str(8 * m.nodes),
            f"{m.sequences} x {m.seq_len:,} in micro-batches of {m.micro_batch}", f"{m.seconds:.2f}",
            f"{step.overlapped_seconds:.2f} to {step.sequential_seconds:.2f}", f"{middle(step) / m.seconds:.2f}",
            f"{ratio(m, *factors):.2f}" + (" (fitted)" if m.is_fitted else ""),
            "; ".join(filter(None, [", ".join(open_values), m.remark])),
        ]  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    errors = [abs(ratio(m) - 1) for m in MEASUREMENTS]
    return PAGE_TEXT.format(
        table="\n".join(rows),
        sources=" and ".join(f"[{n}]({url})" for n, url in SOURCES.items()),
        median=statistics.median(errors),
        kernels=factors[0],
        links=factors[1],
    )


PAGE_TEXT = """\
# Measured and estimated

Others have published the time of training steps on H100s. This page has our estimates of the same steps beside them.
`python -m tests.measured` writes it, and a test compares it. None of these steps was run with our code.

An estimate is an interval: its lower end has all exchanges behind computation, its upper end has none. The ratio is the
middle of the interval over the measured time; the median error is {median:.0%}. Keys that a source does not state have
the values with the shortest estimated step that fit in 90 % of the memory; the last column has them, and what a spec
cannot express. All steps are taken to be compiled, with a residual stream and gathers in bfloat16.

The last but one column is the ratio after two factors are fitted on the marked rows: kernels reach {kernels:.2f} times,
and links {links:.2f} times the shares of their peaks that `cluster.accelerator` and `cluster.network` assume.

| model | source | GPUs | sequences of a step | measured s | estimated s | ratio | fitted ratio | taken to be |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
{table}

- Sources: {sources}.
- Llama3 70B is estimated too slow. With recomputation it reaches about 52 % of the peak, because its products are wide;
  the estimate assumes 40 % for all widths.
- A measurement of GPT-OSS 120B near the lower end of its interval is what hidden exchanges give.

Steps with pipeline or tensor parallelism (DeepSeek V3, Kimi K2, Llama 405B) and models with state-space layers
(Nemotron) are left out, because a spec has neither.
"""


if __name__ == "__main__":
    PAGE.write_text(page())
