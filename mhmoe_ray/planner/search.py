"""Search for the settings of a run that fit a cluster and train fastest by estimate, with the same samples in a step.

Values of the keys that change no loss are compared, and of precisions where `mhmoe plan --search` proposes them: some
hundred thousand settings on a large cluster. A rank's memory and the time of a step are sums of terms that depend on
few keys each, so each term is computed once for each choice of its keys.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from functools import cache
from itertools import product
from typing import Any, NamedTuple

from mhmoe_ray.planner.adapt import (
    BATCH_KEYS,
    SHARDING_KEYS,
    Keys,
    default_value,
    divided_batches,
    on_gpus,
    unset_keys,
    update_keys,
    valid_changes,
    value_of,
)
from mhmoe_ray.planner.estimate import UPDATE, Estimate, compute_times, estimate_step_time, exchange_time
from mhmoe_ray.planner.memory import compute_memory, weight_copy_bytes
from mhmoe_ray.planner.placement import Layout, Node, build_layout, nodes_on_paper, place_workers
from mhmoe_ray.planner.traffic import dispatch_exchanges, reduction_exchanges
from mhmoe_ray.spec import RunSpec

MEMORY_SHARE = 0.9
"""Share of an accelerator's memory that planned memory may take; the framework and its buffers come on top."""
NODE_GPUS = 8
"""GPUs of each node where the nodes are not known."""
LOSS_CHUNK_ROWS = 2048
"""Largest chunk of the loss that is searched; larger ones are hardly faster."""
TRAIN_VALUES: dict[str, tuple[Any, ...]] = {
    "train.recompute": ("none", "experts", "exchange", "block"),
    "train.loss_chunk_rows": (LOSS_CHUNK_ROWS, 1024, 512, 256, 128, None),
    "train.moment_precision": ("float32", "bfloat16"),
    "train.residual_precision": ("float32", "bfloat16"),
}
"""Searched values of keys of `train`, preferred ones first. Values that a spec refuses are left out."""
TOLERANCE = 0.05
"""Share by which a chosen setting may be slower by estimate than the fastest one, if it changes fewer keys. It is less
than the estimate's error (MEASURED.md)."""
BATCH_KEY = "train.micro_batches"
SEARCHED_KEYS = {*TRAIN_VALUES, *SHARDING_KEYS, *(f"train.{key}" for key in BATCH_KEYS)}
"""All keys that a search may change."""
PRECISIONS = {"train.moment_precision", "train.residual_precision", "cluster.gather_precision"}
"""Searched keys that change losses, so that they are proposed but never chosen."""
Pairs = tuple[tuple[str, Any], ...]
"""Values by key, as keys of caches."""


class Setting(NamedTuple):
    """Setting of a run that fits its cluster."""

    keys: Keys
    """Values of all searched keys."""
    spec: RunSpec
    memory: int
    """Bytes of memory of a rank."""
    estimate: Estimate


class Candidate(NamedTuple):
    """Setting that fits by the sums of its terms. Some of its keys may exclude each other."""

    speed: str
    """Mean of both ends of the estimated time of a step, in seconds, as text that sorts by size."""
    narrow_precisions: int
    """Number of precisions that are bfloat16 and not in the spec."""
    chunk_index: int
    """Place of the loss's chunks in `TRAIN_VALUES`: large chunks are faster by more than the estimate tells."""
    memory: int
    parts: tuple[Pairs, ...]

    @property
    def keys(self) -> Keys:
        return {key: value for part in self.parts for key, value in part}


def search_settings(
    spec: RunSpec, nodes: Sequence[Node], count: int, free_keys: Collection[str] = frozenset(SEARCHED_KEYS)
) -> list[Setting]:
    """Return at most `count` settings of a run that fit into the accelerators' memory, the fastest by estimate first.

    Only `free_keys` may differ from the spec, and the ranks have places on `nodes`. Of settings that are equally fast
    to a microsecond, it returns the one with the fewest precisions in bfloat16, then with the largest chunks of the
    loss, and then with the least memory. The list is empty if none fits.
    """
    settings: dict[str, Setting] = {}
    limit = MEMORY_SHARE * spec.cluster.accelerator.memory
    candidates = candidate_settings(spec, nodes, limit, free_keys)
    for candidate in sorted(candidates, key=lambda candidate: candidate[:4]):
        if len(settings) == count:
            break
        if candidate.speed in settings:
            continue
        for keys, variant in valid_changes(spec, [candidate.keys]):
            planned = _at_fewest_workers(variant)
            estimate = estimate_step_time(planned, _layout(planned, nodes))
            settings[candidate.speed] = Setting(keys, variant, compute_memory(planned).total, estimate)
    return list(settings.values())


def choose_settings(spec: RunSpec, nodes: Sequence[Node] = ()) -> tuple[RunSpec, Keys]:
    """Return the spec of a run with values of the keys that it does not set and that change no loss, and these values.

    Of the settings that fit on the nodes and are at most `TOLERANCE` slower than the fastest, they are those of the one
    that changes the fewest keys, and then with the largest micro-batches. If none fits, they need the least memory. A
    run on CPUs keeps its spec. Nodes that cannot hold the run's workers are taken to be nodes with `NODE_GPUS` GPUs.
    """
    if not spec.cluster.gpus_per_worker:
        return spec, {}
    chosen_keys: Keys = {}
    if unset_keys(spec, ["train.compile"]):
        chosen_keys["train.compile"] = not spec.is_random
        spec = update_keys(spec, chosen_keys)
    free_keys = unset_keys(spec, SEARCHED_KEYS - PRECISIONS)
    if not free_keys:
        return spec, chosen_keys
    limit = MEMORY_SHARE * spec.cluster.accelerator.memory
    candidates = list(candidate_settings(spec, nodes, limit, free_keys))
    if candidates:
        slowest = (1 + TOLERANCE) * min(float(candidate.speed) for candidate in candidates)
        fast_candidates = (candidate for candidate in candidates if float(candidate.speed) <= slowest)
        candidates = sorted(fast_candidates, key=lambda c: (_count_changes(c.keys), c.keys[BATCH_KEY], c.speed))
    else:
        all_candidates = candidate_settings(spec, nodes, math.inf, free_keys)
        candidates = sorted(all_candidates, key=lambda c: (c.memory, c.speed))
    keys = next((keys for keys, _ in valid_changes(spec, (c.keys for c in candidates))), {})
    # Keys of `data.parts` are there only if the samples of a step are divided anew.
    keys = {key: value for key, value in keys.items() if key in free_keys or key.startswith("data.parts.")}
    return update_keys(spec, keys), {**chosen_keys, **keys}


def keep_choice(spec: RunSpec, earlier_spec: RunSpec) -> RunSpec:
    """Return the spec of a run on GPUs with the values that were chosen for an earlier run of it."""
    if not spec.cluster.gpus_per_worker:
        return spec
    open_keys = unset_keys(spec, {*SEARCHED_KEYS - PRECISIONS, "train.compile"})
    return update_keys(spec, {key: value_of(earlier_spec, key) for key in open_keys})


def choose_on_paper(spec: RunSpec, nodes: int, gpus: int) -> tuple[RunSpec, Keys]:
    """Return the spec with a worker on each GPU of equal nodes, and the values of the keys that were chosen for them.
    A key that rules so many workers out is a SpecError."""
    spec, chosen_keys = choose_settings(*on_paper(spec, nodes, gpus))
    return spec, {"cluster.workers": nodes * gpus, "cluster.gpus_per_worker": 1, **chosen_keys}


def on_paper(spec: RunSpec, nodes: int, gpus: int) -> tuple[RunSpec, list[Node]]:
    """Return the spec with a worker on each GPU of equal nodes, and these nodes."""
    return on_gpus(spec, nodes * gpus), nodes_on_paper(spec.cluster, nodes, gpus)


def candidate_settings(
    spec: RunSpec,
    nodes: Sequence[Node],
    limit: float,
    free_keys: Collection[str] = frozenset(SEARCHED_KEYS),
) -> Iterator[Candidate]:
    """Yield all settings that need at most `limit` bytes of memory by the sums of their terms."""
    base = _at_fewest_workers(spec)
    workers = base.cluster.max_world_size
    rank_tokens = base.tokens_per_step / workers
    splits = [tuple(split.items()) for split in _splits(spec, free_keys)]
    recompute, chunks, moments, residuals = (
        [((key, keys[key]),) for keys, _ in valid_changes(spec, _train_changes(spec, key, free_keys))]
        for key in TRAIN_VALUES
    )
    layout = cache(lambda ep: _layout(update_keys(base, {"cluster.ep": ep}), nodes))

    def variant(*parts: Pairs) -> RunSpec:
        return update_keys(base, {key: value for part in parts for key, value in part})

    @cache
    def state_bytes(cluster: Pairs, moment: Pairs, split: Pairs) -> int:
        memory = compute_memory(variant(cluster, moment, split))
        return memory.weights + memory.gradients + memory.moments + memory.gathered

    @cache
    def copy_bytes(cluster: Pairs, recomputed: Pairs, chunk: Pairs) -> int:
        return weight_copy_bytes(variant(cluster, recomputed, chunk))

    @cache
    def activation_bytes(ep: Pairs, split: Pairs, recomputed: Pairs, residual: Pairs) -> int:
        return compute_memory(variant(ep, split, recomputed, residual)).activations

    @cache
    def loss_bytes(gather: Pairs, split: Pairs, chunk: Pairs) -> int:
        memory = compute_memory(variant(gather, split, chunk))
        return memory.activations + memory.logits - compute_memory(variant(split)).activations

    @cache
    def compute_seconds(ep: Pairs, split: Pairs, recomputed: Pairs, chunk: Pairs) -> float:
        times, _ = compute_times(variant(ep, split, recomputed, chunk), rank_tokens)
        return sum(time.seconds for time in times if time.name != UPDATE)

    @cache
    def update_seconds(cluster: Pairs, moment: Pairs) -> float:
        times, _ = compute_times(variant(cluster, moment), rank_tokens)
        return sum(time.seconds for time in times if time.name == UPDATE)

    @cache
    def dispatch_seconds(ep: Pairs, split: Pairs, recomputed: Pairs) -> float:
        spec = variant(ep, split, recomputed)
        exchanges = dispatch_exchanges(spec, layout(spec.cluster.ep))
        return sum(exchange_time(exchange, spec, layout(spec.cluster.ep)).seconds for exchange in exchanges)

    @cache
    def reduction_seconds(cluster: Pairs, split: Pairs) -> float:
        spec = variant(cluster, split)
        exchanges = reduction_exchanges(spec, layout(spec.cluster.ep))
        return sum(exchange_time(exchange, spec, layout(spec.cluster.ep)).seconds for exchange in exchanges)

    for cluster, split in product(_clusters(spec, free_keys), splits):
        ep, gather = cluster[:1], cluster[-1:]
        if spec.cluster.straddling == "refuse" and layout(ep[0][1]).groups.refusal_reason:
            continue
        # Of the divisions, the state depends only on whether a rank has a single micro-batch.
        state_split = split if split[0][1] == workers else splits[-1]
        for moment in moments:
            state = state_bytes(cluster, moment, state_split)
            if state > limit:
                continue
            for (chunk_index, chunk), recomputed, residual in product(enumerate(chunks), recompute, residuals):
                memory = state + copy_bytes(cluster, recomputed, chunk)
                memory += activation_bytes(ep, split, recomputed, residual) + loss_bytes(gather, split, chunk)
                if memory > limit:
                    continue
                computing = compute_seconds(ep, split, recomputed, chunk) + update_seconds(cluster, moment)
                exchanging = dispatch_seconds(ep, split, recomputed) + reduction_seconds(cluster, split)
                seconds = (max(computing, exchanging) + computing + exchanging) / 2
                parts = (cluster, split, recomputed, chunk, moment, residual)
                yield Candidate(
                    f"{seconds:012.6f}", _count_narrow(spec, gather + moment + residual), chunk_index, memory, parts
                )


def _count_changes(keys: Keys) -> int:
    """Return how many keys differ from the values that are preferred on GPUs."""
    preferred = {key: default_value(key) for key in SHARDING_KEYS} | {k: v[0] for k, v in TRAIN_VALUES.items()}
    return sum(keys[key] != value for key, value in preferred.items() if key in keys)


def _at_fewest_workers(spec: RunSpec) -> RunSpec:
    """Return the spec with its smallest number of workers, with which a rank needs the most memory."""
    return spec.with_workers(spec.worker_counts[0])


def _values(spec: RunSpec, key: str, all_values: Sequence[Any], free_keys: Collection[str]) -> Sequence[Any]:
    """Return the searched values of a key: that of the spec alone if the key is not free."""
    return all_values if key in free_keys else (value_of(spec, key),)


def _train_changes(spec: RunSpec, key: str, free_keys: Collection[str]) -> list[Keys]:
    return [{key: value} for value in _values(spec, key, TRAIN_VALUES[key], free_keys)]


def _splits(spec: RunSpec, free_keys: Collection[str]) -> list[Keys]:
    """Return the divisions of a step's samples into micro-batches, the smallest micro-batches last."""
    if spec.micro_batch_key is not None or BATCH_KEY not in free_keys:
        return [{BATCH_KEY: spec.train.micro_batches}]
    return divided_batches(spec, spec.cluster.max_world_size)


def _layout(spec: RunSpec, nodes: Sequence[Node]) -> Layout:
    cluster = spec.cluster
    rank_nodes = place_workers(nodes, cluster, cluster.max_world_size)
    if len(rank_nodes) < cluster.max_world_size:
        assumed_nodes = nodes_on_paper(cluster, -(-cluster.max_world_size // NODE_GPUS), NODE_GPUS)
        rank_nodes = place_workers(assumed_nodes, cluster, cluster.max_world_size)
    return build_layout(rank_nodes, cluster.ep)


def _clusters(spec: RunSpec, free_keys: Collection[str]) -> list[Pairs]:
    """Return the valid values of the searched keys of `cluster`; `ep` comes first and `gather_precision` last."""
    workers = _at_fewest_workers(spec).cluster.max_world_size
    sizes = [size for size in range(1, workers + 1) if workers % size == 0]
    all_values: tuple[Sequence[Any], ...] = (
        sizes,
        list(dict.fromkeys(("ddp", "fsdp", spec.cluster.strategy))),
        (False, True),
        (None, *sizes[:-1]),
        ("step", "micro_batch"),
        ("float32", "bfloat16"),
    )
    values = [_values(spec, key, v, free_keys) for key, v in zip(SHARDING_KEYS, all_values, strict=True)]
    defaults = [default_value(key) for key in SHARDING_KEYS[2:]]
    changes: list[Keys] = []
    for ep, strategy, *fsdp_values in product(*values):
        # Without several ranks for each expert there are no shards of experts.
        has_shards = not fsdp_values[0] or (fsdp_values[1] or workers) > ep or SHARDING_KEYS[2] not in free_keys
        if has_shards and (strategy == "fsdp" or fsdp_values == defaults):
            changes.append(dict(zip(SHARDING_KEYS, (ep, strategy, *fsdp_values), strict=True)))
    return [tuple(keys.items()) for keys, _ in valid_changes(spec, changes)]


def _count_narrow(spec: RunSpec, precisions: Pairs) -> int:
    return sum(value == "bfloat16" != value_of(spec, key) for key, value in precisions)
