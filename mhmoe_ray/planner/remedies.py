"""Changes of a spec's keys that lower the memory of a rank, with the bytes that each of them saves."""

from itertools import groupby
from typing import Any, NamedTuple

from mhmoe_ray.planner.adapt import valid_changes
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
        return ", ".join(f"{key}={str(value).lower()}" for key, value in self.keys.items())


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


def _smaller_micro_batches(spec: RunSpec) -> dict[str, Any]:
    size = spec.train.micro_batch_size
    if size % 2:
        return {}
    return {"train.micro_batch_size": size // 2, "train.micro_batches": 2 * spec.train.micro_batches}
