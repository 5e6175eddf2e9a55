"""Changes of a spec's keys, and the division of a step's samples among the workers of another cluster."""

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import reduce
from typing import Any

from mhmoe_ray.errors import SpecError
from mhmoe_ray.spec import ClusterSpec, RunSpec, TrainSpec, apply_overrides, validate_section
from mhmoe_ray.spec.base import Section

Keys = dict[str, Any]
"""New values by dotted key, such as `train.micro_batches`."""
SHARDING_KEYS = tuple(
    f"cluster.{name}" for name in ("ep", "strategy", "shard_experts", "shard_group", "reduce_after", "gather_precision")
)
"""Keys that divide a model among ranks, without a change of losses but for the precision of gathers."""


BATCH_KEYS = ("micro_batches", "micro_batch_size")
"""Keys of `train` that divide the samples of a step."""


def with_keys(spec: RunSpec, keys: Keys) -> RunSpec:
    """Return the spec with other values of some keys; values that do not fit the rest are a SpecError.

    The changed keys do not count as set by the spec, so that they may be chosen anew for another cluster.
    """
    tree = apply_overrides(spec.model_dump(mode="json"), [f"{key}={json.dumps(value)}" for key, value in keys.items()])
    changed_spec = validate_section(RunSpec, tree, f"spec {spec.name}")
    for name in ("train", "cluster"):
        getattr(changed_spec, name).model_fields_set.intersection_update(getattr(spec, name).model_fields_set)
    return changed_spec


def valid_changes(spec: RunSpec, changes: Iterable[Keys]) -> Iterator[tuple[Keys, RunSpec]]:
    """Yield those of some changes of a spec that fit the rest of it, each with the changed spec."""
    for keys in changes:
        try:
            yield keys, with_keys(spec, keys)
        except SpecError:
            continue


def update_keys(spec: RunSpec, keys: Keys) -> RunSpec:
    """Return the spec with valid values of some keys, which do not count as set by the spec."""
    for key, value in keys.items():
        spec = _with_value(spec, key.split("."), value)
    return spec


def _with_value(section: Any, path: list[str], value: Any) -> Any:
    if not path:
        return value
    name, *lower_names = path
    if isinstance(section, Mapping):
        return {**section, name: _with_value(section[name], lower_names, value)}
    changed_section = section.model_copy(update={name: _with_value(getattr(section, name), lower_names, value)})
    changed_section.model_fields_set.intersection_update(section.model_fields_set)
    return changed_section


def unset_keys(spec: RunSpec, keys: Iterable[str]) -> set[str]:
    """Return those of some keys, each of a section at the top, that the spec does not set."""
    return {key for key in keys if key.split(".")[1] not in getattr(spec, key.split(".")[0]).model_fields_set}


def on_gpus(spec: RunSpec, workers: int) -> RunSpec:
    """Return the spec with a worker on each of so many GPUs. If these do not divide the number of micro-batches, the
    samples of a step are divided into the smallest ones that they can share; a key that rules that out is a SpecError.
    """
    for key in ("ep", "shard_group"):
        size = getattr(spec.cluster, key)
        if size and workers % size and not unset_keys(spec, [f"cluster.{key}"]):
            fix = f"set it to a divisor of {workers:,}, or plan for a multiple of {size:,} GPUs"
            raise SpecError(f"spec {spec.name}", f"cluster.{key}: {size} does not divide {workers:,} GPUs", fix)
    batches = divided_batches(spec, workers)[-1] if spec.train.micro_batches % workers else {}
    # Keys that were chosen for another number of GPUs would forbid this one.
    defaults = {key: default_value(key) for key in unset_keys(spec, SHARDING_KEYS)}
    changed_spec = with_keys(spec, {**defaults, "cluster.workers": workers, "cluster.gpus_per_worker": 1, **batches})
    if batches:
        changed_spec.train.model_fields_set.difference_update(BATCH_KEYS)
    return changed_spec


def value_of(spec: RunSpec, key: str) -> Any:
    """Return the value of a key of `cluster` or `train`."""
    section, _, name = key.partition(".")
    return getattr(getattr(spec, section), name)


def default_value(key: str) -> Any:
    """Return the value that a key of `cluster` or `train` has on CPUs if a spec does not set it."""
    section, _, name = key.partition(".")
    sections: dict[str, type[Section]] = {"cluster": ClusterSpec, "train": TrainSpec}
    return sections[section].model_fields[name].default


def changed_keys(spec: RunSpec, keys: Keys) -> Keys:
    """Return those of some keys whose values are neither set by the spec nor the defaults on CPUs."""
    return {key: value for key, value in keys.items() if value != _stated_value(spec, key)}


def _stated_value(spec: RunSpec, key: str) -> Any:
    if not key.startswith("data.") and unset_keys(spec, [key]):
        return default_value(key)
    return reduce(lambda tree, part: tree[part], key.split("."), spec.model_dump(mode="json"))


def format_keys(keys: Keys) -> list[str]:
    """Return keys with their values as `--set` takes them."""
    return [f"{key}={'null' if value is None else str(value).lower()}" for key, value in keys.items()]


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
