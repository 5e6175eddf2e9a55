"""Keys that lower the memory of a rank, with the bytes that each of them saves for a spec."""

from itertools import groupby
from typing import Any, NamedTuple

from pydantic import ValidationError

from mhmoe_ray.planner.memory import compute_memory
from mhmoe_ray.spec import RunSpec

CANDIDATES: tuple[dict[str, Any], ...] = (
    {"train.recompute": "block"},
    {"train.recompute": "exchange"},
    {"train.loss_chunk_rows": 128},
    {"cluster.strategy": "fsdp"},
    {"cluster.strategy": "fsdp", "cluster.shard_experts": True},
    {"cluster.shard_experts": True},
    {"cluster.gather_precision": "bfloat16"},
    {"train.moment_precision": "bfloat16"},
    {"train.residual_precision": "bfloat16"},
)
"""Values of keys that lower memory, by key."""
SMALLEST_SHARE = 0.01
"""Smallest share of the memory that a remedy must save to be named."""


class Remedy(NamedTuple):
    """Change of a spec that lowers the memory of a rank."""

    keys: dict[str, Any]
    """New values by key."""
    saved_bytes: int

    def __str__(self) -> str:
        return ", ".join(f"{key}={_format_value(value)}" for key, value in self.keys.items())


def memory_remedies(spec: RunSpec) -> list[Remedy]:
    """Return the changes that lower the memory of a rank, each by itself, those that save most first."""
    total = compute_memory(spec).total
    remedies = []
    for keys in (*CANDIDATES, _smaller_micro_batches(spec)):
        changed_spec = _with_keys(spec, keys)
        if changed_spec is not None:
            saved_bytes = total - compute_memory(changed_spec).total
            if saved_bytes >= SMALLEST_SHARE * total:
                remedies.append(Remedy(keys, saved_bytes))
    # Of two remedies that save the same, the shorter one comes first, and the other adds nothing.
    remedies.sort(key=lambda remedy: (-remedy.saved_bytes, len(remedy.keys)))
    return [next(group) for _, group in groupby(remedies, key=lambda remedy: remedy.saved_bytes)]


def _smaller_micro_batches(spec: RunSpec) -> dict[str, Any]:
    """Return the keys of micro-batches of half the size, with as many samples in a step; none if a size is odd."""
    size = spec.train.micro_batch_size
    if size % 2:
        return {}
    return {"train.micro_batch_size": size // 2, "train.micro_batches": 2 * spec.train.micro_batches}


def _with_keys(spec: RunSpec, keys: dict[str, Any]) -> RunSpec | None:
    """Return a spec with other values of some keys; None if they are not possible together."""
    sections = spec.model_dump()
    for key, value in keys.items():
        section, name = key.split(".")
        sections[section][name] = value
    try:
        return RunSpec.model_validate(sections)
    except ValidationError:
        return None


def _format_value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
