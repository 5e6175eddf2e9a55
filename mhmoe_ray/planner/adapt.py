"""Defaults of runs on GPUs, and the choice of micro-batches, ep and sharding for GPUs, which leaves the samples of a
step and their losses as they are."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from mhmoe_ray.errors import SpecError
from mhmoe_ray.planner.memory import compute_memory
from mhmoe_ray.spec import RunSpec, apply_overrides, validate_section

GPU_MEMORY_SHARE = 0.8
"""Share of an accelerator's memory that planned memory may take; the framework and its buffers come on top."""
LOSS_CHUNK_ROWS = 2048
"""Rows of a chunk of the loss on GPUs; half as many for large vocabularies."""
Keys = dict[str, Any]
"""New values by dotted key, such as `train.micro_batches`."""


def with_keys(spec: RunSpec, keys: Keys) -> RunSpec:
    """Return the spec with other values of some keys; values that do not fit the rest are a SpecError."""
    tree = apply_overrides(spec.model_dump(mode="json"), [f"{key}={json.dumps(value)}" for key, value in keys.items()])
    return validate_section(RunSpec, tree, f"spec {spec.name}")


def valid_changes(spec: RunSpec, changes: Iterable[Keys]) -> Iterator[tuple[Keys, RunSpec]]:
    """Yield those of some changes of a spec that fit the rest of it, each with the changed spec."""
    for keys in changes:
        try:
            yield keys, with_keys(spec, keys)
        except SpecError:
            continue


def with_gpu_defaults(spec: RunSpec) -> RunSpec:
    """Return a spec with the defaults of GPUs for keys that it does not set; a run on CPUs keeps its spec."""
    if not spec.cluster.gpus_per_worker:
        return spec
    defaults: Keys = {"train.compile": not spec.model.is_random}
    if spec.model.family.predicts_next_token:
        # A chunk of the loss holds its logits several times.
        chunk_rows = LOSS_CHUNK_ROWS if spec.model.vocab_size <= 65_536 else LOSS_CHUNK_ROWS // 2
        defaults["train.loss_chunk_rows"] = chunk_rows
    keys = {key: value for key, value in defaults.items() if key not in _set_keys(spec)}
    spec = update_keys(spec, keys)
    if spec.cluster.strategy == "fsdp" and "cluster.reduce_after" not in _set_keys(spec) and not _fits(spec):
        reduced = update_keys(spec, {"cluster.reduce_after": "micro_batch"})
        return min(spec, reduced, key=lambda variant: compute_memory(variant).total)
    return spec


def _set_keys(spec: RunSpec) -> set[str]:
    return {f"{name}.{key}" for name in ("train", "cluster") for key in getattr(spec, name).model_fields_set}


def update_keys(spec: RunSpec, keys: Keys) -> RunSpec:
    """Return the spec with valid values of keys in its sections; other keys that are not set stay so."""
    for key, value in keys.items():
        name, _, field = key.partition(".")
        spec = spec.model_copy(update={name: getattr(spec, name).model_copy(update={field: value})})
    return spec


def fill_gpu(spec: RunSpec) -> RunSpec:
    """Return a preset's spec with the largest micro-batches that fit on its GPUs, and with the same samples per step.

    Papers' presets have micro-batches of one sequence, with which a GPU mostly waits for launches of kernels.
    """
    if not spec.cluster.gpus_per_worker or not _may_fill(spec):
        return spec
    changes = _micro_batches(spec, range(1, spec.train.micro_batches))
    return next((filled for _, filled in valid_changes(spec, changes) if _fits(filled)), spec)


def adapt_to_gpus(spec: RunSpec, nodes: int, gpus: int) -> tuple[RunSpec, Keys]:
    """Return the spec with a worker on each GPU of `nodes` nodes, and the values of the keys that were chosen for them.

    Micro-batches are divided anew if the workers do not divide their number. If the memory of a GPU does not suffice,
    ep and sharding change unless the spec sets them. A key that rules the workers out is a SpecError.
    """
    spec = with_gpu_defaults(update_keys(spec, {"cluster.gpus_per_worker": 1}))
    workers, share, batches = nodes * gpus, 1.0, [Keys()]
    for key in ("ep", "shard_group"):
        size = getattr(spec.cluster, key)
        if size and workers % size:
            fix = f"set it to a divisor of {workers:,}, or plan for a multiple of {size:,} GPUs"
            raise SpecError(f"spec {spec.name}", f"cluster.{key}: {size} does not divide {workers:,} GPUs", fix)
    if spec.train.micro_batches % workers:
        share, batches = GPU_MEMORY_SHARE, divided_batches(spec, workers)
    base = {"cluster.workers": workers, "cluster.gpus_per_worker": 1}
    # A sharding with which even the smallest micro-batches do not fit need not be tried with larger ones.
    changes = [{**base, **sharding, **batches[-1]} for sharding in _shardings(spec, gpus)]
    variants = list(valid_changes(spec, changes)) or [(changes[0], with_keys(spec, changes[0]))]
    smallest_variant = min(variants, key=lambda variant: compute_memory(variant[1]).total)
    choice = next((variant for variant in variants if _fits(variant[1], share)), smallest_variant)
    larger = valid_changes(spec, ({**choice[0], **sizes} for sizes in batches[:-1]))
    keys, adapted = next((variant for variant in larger if _fits(variant[1], share)), choice)
    # The micro-batches of a preset may depend on its GPUs, so they count as chosen, too.
    batch_keys = ("micro_batches", "micro_batch_size") if spec.origin and _may_fill(spec) else ()
    return adapted, {**keys, **{f"train.{key}": getattr(adapted.train, key) for key in batch_keys}}


def _may_fill(spec: RunSpec) -> bool:
    return not spec.data.parts and spec.micro_batch_key is None


def _fits(spec: RunSpec, share: float = GPU_MEMORY_SHARE) -> bool:
    return compute_memory(spec).total <= share * spec.cluster.accelerator.memory


def _samples_by_key(spec: RunSpec) -> dict[str, int]:
    """Return the samples of a step, by the key that has the samples of a micro-batch: those of each part, and all."""
    sizes = {f"data.parts.{name}.micro_batch_size": part.micro_batch_size for name, part in spec.data.parts.items()}
    sizes["train.micro_batch_size"] = spec.train.micro_batch_size
    return {key: size * spec.train.micro_batches for key, size in sizes.items()}


def _micro_batches(spec: RunSpec, counts: Iterable[int]) -> Iterator[Keys]:
    """Yield divisions of a step's samples into numbers of equal micro-batches from `counts`."""
    samples_by_key = _samples_by_key(spec)
    for count in counts:
        if all(samples % count == 0 for samples in samples_by_key.values()):
            yield {"train.micro_batches": count, **{key: n // count for key, n in samples_by_key.items()}}


def divided_batches(spec: RunSpec, workers: int) -> list[Keys]:
    """Return the divisions of a step's samples among workers, largest micro-batches first; SpecError without one."""
    label, count, size = f"spec {spec.name}", spec.train.micro_batches, spec.train.micro_batch_size
    if key := spec.micro_batch_key:
        reason = f"train.micro_batches: {count} is not a multiple of {workers:,} GPUs, and {key} forbids other ones"
        raise SpecError(label, reason, f"plan for a number of GPUs that divides {count}, or set train.micro_batches")
    for key, samples in _samples_by_key(spec).items():
        if samples % workers:
            reason = f"{key}: {samples // count} in train.micro_batches: {count} make {samples:,} samples in a step, "
            reason += f"which {workers:,} GPUs cannot share equally"
            raise SpecError(label, reason, f"plan for a number of GPUs that divides {samples:,}, or set {key}")
    # A spec has at most a million micro-batches, of at most a million samples each.
    return list(_micro_batches(spec, range(workers, min(count * size, 1_000_000) + 1, workers)))


def _shardings(spec: RunSpec, gpus: int) -> Iterator[Keys]:
    """Yield values of the keys of `cluster` that the spec leaves open, those that send the least first."""
    fixed_keys = spec.cluster.model_fields_set
    fsdp = {} if "strategy" in fixed_keys else {"cluster.strategy": "fsdp"}
    all_shards = fsdp if "shard_experts" in fixed_keys else {**fsdp, "cluster.shard_experts": True}
    shardings = [{}, fsdp, all_shards]
    if "reduce_after" not in fixed_keys:
        shardings += [{**sharding, "cluster.reduce_after": "micro_batch"} for sharding in (fsdp, all_shards)]
    ep_sizes = [] if "ep" in fixed_keys else [size for size in range(2, gpus + 1) if gpus % size == 0]
    for sharding in shardings:
        yield from ({**sharding, **ep} for ep in ({}, *({"cluster.ep": size} for size in ep_sizes)))
