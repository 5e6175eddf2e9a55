"""Search for the settings of a run that fit a cluster and train fastest by estimate, with the same samples in a step.

All values of the keys that change no loss are compared, and of the precisions that `mhmoe plan` proposes: some hundred
thousand settings on a large cluster. A rank's memory and the time of a step are sums of terms that depend on few keys
each, so each term is computed once for each choice of its keys.
"""

from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import Any, NamedTuple

from mhmoe_ray.planner.adapt import Keys, divided_batches, update_keys, valid_changes, with_keys
from mhmoe_ray.planner.estimate import UPDATE, Estimate, compute_times, estimate_step_time, exchange_time
from mhmoe_ray.planner.memory import compute_memory
from mhmoe_ray.planner.placement import Layout, build_layout, hypothetical_nodes, pack_workers
from mhmoe_ray.planner.traffic import dispatch_exchanges, reduction_exchanges
from mhmoe_ray.spec import RunSpec

MEMORY_SHARE = 0.9
"""Share of an accelerator's memory that planned memory may take; the framework and its buffers come on top."""
TRAIN_VALUES: dict[str, tuple[Any, ...]] = {
    "train.recompute": ("none", "experts", "exchange", "block"),
    "train.loss_chunk_rows": (2048, 1024, 512, 256, 128, None),
    "train.moment_precision": ("float32", "bfloat16"),
    "train.residual_precision": ("float32", "bfloat16"),
}
"""Searched values of keys of `train`, preferred ones first. Values that a spec refuses are left out."""
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


def search_settings(spec: RunSpec, nodes: int, gpus: int, count: int) -> list[Setting]:
    """Return the `count` fastest settings that fit on equal nodes with `gpus` GPUs each, the fastest first.

    Of settings that are equally fast to a microsecond, it returns the one with the fewest precisions in bfloat16, then
    with the largest chunks of the loss, and then with the least memory. The list is empty if none fits. Samples that
    the GPUs cannot share are a SpecError.
    """
    settings: dict[str, Setting] = {}
    base = _on_cluster(spec, nodes, gpus)
    for candidate in sorted(candidate_settings(spec, nodes, gpus), key=lambda candidate: candidate[:4]):
        if len(settings) == count:
            break
        if candidate.speed in settings:
            continue
        keys = {key: value for part in candidate.parts for key, value in part}
        for _, variant in valid_changes(base, [keys]):
            estimate = estimate_step_time(variant, _layout(variant, nodes, gpus))
            settings[candidate.speed] = Setting(keys, variant, compute_memory(variant).total, estimate)
    return list(settings.values())


def candidate_settings(spec: RunSpec, nodes: int, gpus: int) -> Iterator[Candidate]:
    """Yield all settings that fit by the sums of their terms; the arguments are those of `search_settings`."""
    base = _on_cluster(spec, nodes, gpus)
    workers = nodes * gpus
    rank_tokens = base.tokens_per_step / workers
    splits = [tuple(split.items()) for split in _splits(spec, workers)]
    recompute, chunks, moments, residuals = (
        [((key, keys[key]),) for keys, _ in valid_changes(base, ({key: value} for value in values))]
        for key, values in TRAIN_VALUES.items()
    )
    layout = cache(lambda ep: _layout(update_keys(base, {"cluster.ep": ep}), nodes, gpus))

    def variant(*parts: Pairs) -> RunSpec:
        return update_keys(base, {key: value for part in parts for key, value in part})

    @cache
    def state_bytes(cluster: Pairs, moment: Pairs, chunk: Pairs, split: Pairs) -> int:
        memory = compute_memory(variant(cluster, moment, chunk, split))
        return memory.weights + memory.gradients + memory.moments + memory.gathered + memory.copies

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

    limit = MEMORY_SHARE * spec.cluster.accelerator.memory
    for cluster, split in product(_clusters(base), splits):
        ep, gather = cluster[:1], cluster[-1:]
        # Of the divisions, the state depends only on whether a rank has a single micro-batch.
        state_split = split if split[0][1] == workers else splits[-1]
        for moment, (chunk_index, chunk) in product(moments, enumerate(chunks)):
            state = state_bytes(cluster, moment, chunk, state_split)
            if state > limit:
                continue
            for recomputed, residual in product(recompute, residuals):
                memory = state + activation_bytes(ep, split, recomputed, residual) + loss_bytes(gather, split, chunk)
                if memory > limit:
                    continue
                computing = compute_seconds(ep, split, recomputed, chunk) + update_seconds(cluster, moment)
                exchanging = dispatch_seconds(ep, split, recomputed) + reduction_seconds(cluster, split)
                seconds = (max(computing, exchanging) + computing + exchanging) / 2
                parts = (cluster, split, recomputed, chunk, moment, residual)
                yield Candidate(
                    f"{seconds:012.6f}", _count_narrow(spec, gather + moment + residual), chunk_index, memory, parts
                )


def _on_cluster(spec: RunSpec, nodes: int, gpus: int) -> RunSpec:
    """Return the spec with a worker on each GPU, and with micro-batches that the workers can share."""
    workers = nodes * gpus
    return with_keys(spec, {"cluster.workers": workers, "cluster.gpus_per_worker": 1, **_splits(spec, workers)[-1]})


def _splits(spec: RunSpec, workers: int) -> list[Keys]:
    """Return the divisions of a step's samples into micro-batches, the smallest micro-batches last."""
    if spec.micro_batch_key is not None and spec.train.micro_batches % workers == 0:
        return [{"train.micro_batches": spec.train.micro_batches}]
    return divided_batches(spec, workers)


def _layout(spec: RunSpec, nodes: int, gpus: int) -> Layout:
    all_nodes = hypothetical_nodes(nodes, gpus, gpus, spec.cluster.network.nodes_per_domain)
    return build_layout(pack_workers(all_nodes, 1, 1, nodes * gpus), spec.cluster.ep)


def _clusters(base: RunSpec) -> list[Pairs]:
    """Return the valid values of the searched keys of `cluster`; `ep` comes first and `gather_precision` last."""
    workers = base.cluster.max_world_size
    sizes = [size for size in range(1, workers + 1) if workers % size == 0]
    changes: list[Keys] = []
    for ep, strategy in product(sizes, {"ddp", base.cluster.strategy} - {"fsdp"}):
        changes.append(_cluster_keys(ep, strategy, False, None, "step", "float32"))
    precisions = ("float32", "bfloat16")
    for ep, shard_group in product(sizes, (None, *sizes[:-1])):
        # Without several ranks for each expert there are no shards of experts.
        shard_experts = (False, True) if (shard_group or workers) > ep else (False,)
        for shards, reduce_after, precision in product(shard_experts, ("step", "micro_batch"), precisions):
            changes.append(_cluster_keys(ep, "fsdp", shards, shard_group, reduce_after, precision))
    return [tuple(keys.items()) for keys, _ in valid_changes(base, changes)]


def _cluster_keys(*values: Any) -> Keys:
    names = ("ep", "strategy", "shard_experts", "shard_group", "reduce_after", "gather_precision")
    return {f"cluster.{name}": value for name, value in zip(names, values, strict=True)}


def _count_narrow(spec: RunSpec, precisions: Pairs) -> int:
    sections = {"cluster": spec.cluster, "train": spec.train}
    return sum(
        value == "bfloat16" != getattr(sections[section], field)
        for key, value in precisions
        for section, _, field in [key.partition(".")]
    )
