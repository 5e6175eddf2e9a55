"""The cost of a model of the hub on a cluster on paper: to train or fine-tune, to upcycle to MH-MoE, and to serve."""

import math
from pathlib import Path
from typing import Any

from mhmoe_ray.api.search import fitting_settings
from mhmoe_ray.checkpoint.huggingface.config import PlannedModel, read_planned_model
from mhmoe_ray.checkpoint.huggingface.hub import PREFIX, settings_folder
from mhmoe_ray.errors import SpecError
from mhmoe_ray.planner.family import bytes_of
from mhmoe_ray.planner.search import MEMORY_SHARE
from mhmoe_ray.planner.sizes import compute_sizes
from mhmoe_ray.spec import ModelSpec, RunSpec, validate_section
from mhmoe_ray.spec.cluster import AcceleratorSpec

SEQUENCES, SEQ_LEN = 512, 4096
"""Sequences of a step, rounded up to a multiple of the GPUs, and tokens of each, at most the context length."""
UPCYCLED_HEADS = (2, 4)
UPCYCLED_EXPERTS, UPCYCLED_TOP_K = 8, 2
"""Experts of a dense model that is upcycled. Each has the width of the dense layer, which becomes the shared expert."""


def plan_model(source: str, nodes: int, gpus: int, tokens: float = 1e9) -> dict[str, Any]:
    """Return the cost of a model on equal nodes with `gpus` H100s each, as `mhmoe plan --hf --json` prints it.

    Only config.json is read. A model that this package does not compute is planned as a similar one; its counts are
    exact.

    Args:
        source: a folder with config.json, or `ORGANIZATION/NAME` of the hub.
        nodes: number of nodes.
        gpus: number of GPUs of each node.
        tokens: number of training tokens.

    Returns:
        A JSON object. `ways` has an entry for training all weights as they are, and for each number of heads after
        upcycling: `keys` of the fastest setting that fits, or `problem` if none does. `serving` has bytes and replicas.

    Raises:
        CheckpointError: config.json cannot be read, or describes a model that cannot be planned.
    """
    folder = Path(source)
    if not folder.exists():
        folder = settings_folder(PREFIX + source.removeprefix(PREFIX))
    planned = read_planned_model(folder)
    sizes = compute_sizes(planned.model)
    counts = planned.counts
    parameters, active = counts[:2] if counts else (sizes.parameters, sizes.active_parameters)
    cache_values = counts.cache_values if counts else 2 * planned.model.layers * planned.model.kv_width
    models = {"train or fine-tune": planned.model}
    models |= {f"upcycle to MH-MoE, h {heads}": _upcycled(planned.model, heads) for heads in UPCYCLED_HEADS}
    return {
        "source": source,
        "approximated": counts is not None,
        "parameters": parameters,
        "active_parameters": active,
        "planned_parameters": sizes.parameters,
        "tokens": tokens,
        "ways": {name: _training(name, model, planned, nodes, gpus, tokens) for name, model in models.items()},
        "serving": _serving(parameters, active, cache_values, nodes * gpus),
    }


def _training(
    name: str, model: ModelSpec, planned: PlannedModel, nodes: int, gpus: int, tokens: float
) -> dict[str, Any]:
    """Return the sizes of a model, and the estimate of its training in the fastest setting that fits."""
    workers, sizes = nodes * gpus, compute_sizes(model)
    figures: dict[str, Any] = {"parameters": sizes.parameters, "active_parameters": sizes.active_parameters}
    sequences = math.ceil(SEQUENCES / workers) * workers
    tree = {
        "name": "plan",
        "model": model.model_dump(mode="json"),
        "data": {
            "sources": {"text": {"path": "text"}},
            "prepared": "p",
            "seq_len": min(SEQ_LEN, planned.context_length),
        },
        "train": {"steps": 1, "micro_batches": sequences, "micro_batch_size": 1, "precision": "bfloat16", "lr": 1e-4},
        "cluster": {"gpus_per_worker": 1, "strategy": "fsdp"},
    }
    try:
        [setting] = fitting_settings(validate_section(RunSpec, tree, name), nodes, gpus, 1)
    except SpecError as e:
        return figures | {"problem": f"{e.reason}; {e.fix}"}
    step = setting.estimate
    hours = [workers * tokens / step.tokens * s / 3600 for s in (step.overlapped_seconds, step.sequential_seconds)]
    return figures | {
        "keys": setting.keys,
        "memory_per_gpu": setting.memory,
        "step_seconds": [step.overlapped_seconds, step.sequential_seconds],
        "tokens_per_s": [step.tokens / s for s in (step.sequential_seconds, step.overlapped_seconds)],
        "gpu_hours": hours,
    }


def _upcycled(model: ModelSpec, heads: int) -> ModelSpec:
    """Return the MH-MoE model into which `start.how: upcycle` turns a dense model or a sparse mixture."""
    tree = model.model_dump(mode="json")
    if model.moe is not None:
        tree["moe"] |= {"heads": heads, "d_sub_token": model.d_model, "head_projection": None, "merge_projection": None}
    else:
        experts = {"experts": UPCYCLED_EXPERTS, "top_k": UPCYCLED_TOP_K, "d_expert": model.d_ff, "d_shared": model.d_ff}
        tree |= {"d_ff": None, "moe": {"heads": heads, "every": 1, **experts}}
    return ModelSpec.model_validate(tree)


def _serving(parameters: int, active_parameters: int, cache_values: int, gpus: int) -> dict[str, Any]:
    """Return the memory of a replica that serves a model in bfloat16 with tensor parallelism, and bounds of its speed.

    A replica has the fewest GPUs, a power of two, whose weights leave a fifth of the usable memory to the cache.
    """
    accelerator, size = AcceleratorSpec(), bytes_of("bfloat16")
    usable = MEMORY_SHARE * accelerator.memory
    replica_gpus = 2 ** max(0, math.ceil(math.log2(size * parameters / (0.8 * usable))))
    bandwidth = accelerator.memory_bandwidth * accelerator.memory_share * replica_gpus
    return {
        "weight_bytes": size * parameters,
        "cache_bytes_per_token": size * cache_values,
        "gpus_per_replica": replica_gpus,
        "replicas": gpus // replica_gpus,
        "cached_tokens_per_replica": int((usable * replica_gpus - size * parameters) / (size * cache_values)),
        # A single sequence reads the weights that a token uses once per token.
        "tokens_per_s_of_one_sequence_at_most": bandwidth / (size * active_parameters),
    }
