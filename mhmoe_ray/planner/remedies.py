"""Changes of a spec's keys that lower the memory of a rank, with the bytes that each of them saves, and advice for
GPUs."""

from itertools import groupby
from typing import Any, NamedTuple

from mhmoe_ray.architectures import FLOAT32
from mhmoe_ray.planner.adapt import format_keys, valid_changes
from mhmoe_ray.planner.family import bytes_of
from mhmoe_ray.planner.memory import compute_memory
from mhmoe_ray.spec import RunSpec

CANDIDATES: tuple[dict[str, Any], ...] = (
    {"train.recompute": "block"},
    {"train.recompute": "exchange"},
    {"train.recompute": "experts"},
    {"train.loss_chunk_rows": 128},
    {"cluster.strategy": "fsdp"},
    {"cluster.strategy": "fsdp", "cluster.shard_experts": True},
    {"cluster.shard_experts": True},
    {"cluster.reduce_after": "micro_batch"},
    {"cluster.gather_precision": "bfloat16"},
    {"cluster.reduce_precision": "bfloat16"},
    {"train.moment_precision": "bfloat16"},
    {"train.residual_precision": "bfloat16"},
)
"""Changes of a spec that may lower the memory of a rank, each as new values by key."""
SMALLEST_SHARE = 0.01
"""Smallest share of a rank's memory that a change must save to be proposed."""


class Remedy(NamedTuple):
    """Change of a spec that lowers the memory of a rank."""

    keys: dict[str, Any]
    """New values by key, such as `train.recompute`."""
    saved_bytes: int

    def __str__(self) -> str:
        return ", ".join(format_keys(self.keys))


def memory_remedies(spec: RunSpec) -> list[Remedy]:
    """Return the changes of a spec that each by itself lower the memory of a rank, starting with the largest saving."""
    total = compute_memory(spec).total
    remedies = []
    for keys, changed_spec in valid_changes(spec, (*CANDIDATES, _smaller_micro_batches(spec))):
        saved_bytes = total - compute_memory(changed_spec).total
        if saved_bytes >= SMALLEST_SHARE * total:
            remedies.append(Remedy(keys, saved_bytes))
    # Of several changes that save the same number of bytes, only the one with the fewest keys is kept: the other keys
    # add nothing.
    remedies.sort(key=lambda remedy: (-remedy.saved_bytes, len(remedy.keys)))
    return [next(group) for _, group in groupby(remedies, key=lambda remedy: remedy.saved_bytes)]


def residual_advice(spec: RunSpec) -> str | None:
    """Return a line that recommends a residual stream in bfloat16 on GPUs, with its cost; None if the run has one."""
    narrow = list(valid_changes(spec, [{"train.residual_precision": "bfloat16"}]))
    if not narrow or spec.train.residual_precision == "bfloat16" or not spec.cluster.gpus_per_worker:
        return None
    saved_memory = compute_memory(spec).total - compute_memory(narrow[0][1]).total
    # A block adds to the stream twice. Each addition reads and writes the stream, and so does its gradient.
    values = spec.tokens_per_step // spec.cluster.max_world_size * spec.model.d_model * 2 * spec.model.layers
    saved_bytes = 4 * values * (FLOAT32 - bytes_of("bfloat16"))
    memory = f"{saved_memory / 1e9:.1f} GB of a rank's memory and " if saved_memory > 0 else ""
    return (
        f"recommended on GPUs: train.residual_precision=bfloat16 saves {memory}about {saved_bytes / 1e9:,.1f} GB that "
        "a rank moves in a step; it changes the loss, by up to 0.5 % in tests of 20 steps of a small model, and its "
        "cost in a long training was not measured"
    )


def _smaller_micro_batches(spec: RunSpec) -> dict[str, Any]:
    size = spec.train.micro_batch_size
    if size % 2:
        return {}
    return {"train.micro_batch_size": size // 2, "train.micro_batches": 2 * spec.train.micro_batches}
