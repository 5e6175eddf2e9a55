"""The plan of a run: its sizes, memory and traffic, the placement of its ranks, and estimated times of a step."""

from typing import Any

from mhmoe_ray.api.defaults import OnNote, ignore_note
from mhmoe_ray.api.placement import (
    Placement,
    choose_for_cluster,
    forecast_placement,
    planned_placement,
    spec_for_layout,
)
from mhmoe_ray.api.spec import require_spec
from mhmoe_ray.checkpoint.start.record import plan_start
from mhmoe_ray.data.chat.template import check_template
from mhmoe_ray.data.shards.manifest import read_data_manifest
from mhmoe_ray.data.shards.recipe import check_recipe
from mhmoe_ray.data.sources.find import source_errors
from mhmoe_ray.data.tokenizer.load import read_given_tokenizer
from mhmoe_ray.errors import DataError, SpecError
from mhmoe_ray.planner.estimate import Estimate, estimate_step_time, exchange_time
from mhmoe_ray.planner.expert_step import expected_drop_share, expert_step
from mhmoe_ray.planner.kernels import assumed_kernel
from mhmoe_ray.planner.match import compare_models
from mhmoe_ray.planner.memory import checkpoint_copy_bytes, compute_memory
from mhmoe_ray.planner.placement import Layout, single_node_layout
from mhmoe_ray.planner.remedies import memory_remedies, residual_advice
from mhmoe_ray.planner.search import choose_on_paper
from mhmoe_ray.planner.sizes import compute_sizes, flops_per_token, model_parts
from mhmoe_ray.planner.traffic import Exchange, LinkLoads, all_exchanges, dispatch_exchanges, reduction_exchanges
from mhmoe_ray.spec import DataSpec, RunSpec

DISPATCHES = ("flat", "hierarchical")


def plan(
    spec: RunSpec,
    nodes: int | None = None,
    gpus: int | None = None,
    address: str | None = None,
    on_note: OnNote = ignore_note,
) -> dict[str, Any]:
    """Compute the plan of a run, which has sizes, memory, traffic and placement, as `mhmoe plan --json` prints it.

    By default, ranks are placed as on the cluster on which the run would start, if one is running. With `nodes` and
    `gpus`, the run's workers fill a hypothetical cluster. On GPUs the key `chosen` has the values of the keys that the
    spec leaves open and that change no loss, and the key `estimate` has the estimated times of a step.

    Args:
        spec: spec of the run.
        nodes: number of nodes of the hypothetical cluster.
        gpus: number of GPUs of each of these nodes, each with one worker.
        address: address of the cluster; None for the default cluster.
        on_note: callback that gets a warning if the cluster does not answer.

    Returns:
        A JSON object. Its key `warnings` has the problems with the data that would end the run before its first step.

    Raises:
        SpecError: `spec` is not a loaded spec, `nodes` and `gpus` do not describe a cluster, or the run cannot have
            that many workers with its other keys.
    """
    require_spec(spec)
    if nodes is None and gpus is None:
        spec, chosen_keys = choose_for_cluster(spec, address)
        placement = forecast_placement(spec, address, on_note)
        return plan_figures(spec, placement, data_warnings(spec), chosen_keys)
    if nodes is None or gpus is None or nodes < 1 or gpus < 1 or address is not None:
        reason = f"a cluster on paper has at least one node and one GPU, and no address ({nodes}, {gpus}, {address})"
        raise SpecError("plan", reason, "give nodes and gpus")
    adapted, chosen_keys = choose_on_paper(spec, nodes, gpus)
    return plan_figures(adapted, planned_placement(adapted, nodes, gpus), data_warnings(adapted), chosen_keys)


def plan_figures(
    spec: RunSpec, placement: Placement, warnings: list[str], chosen_keys: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return a plan as `mhmoe plan --json` prints it; on GPUs it has `chosen_keys` and the estimated step times."""
    layout, step = placement.layout, estimate_step(spec, placement.layout)
    estimate = estimate_figures(spec, layout, step) if layout and step else None
    advice = residual_advice(spec)
    figures = {
        "chosen": chosen_keys or None,
        "estimate": estimate,
        "advice": [advice] if advice else [],
        "warnings": warnings,
    }
    return placement_figures(spec, placement) | figures


def data_warnings(spec: RunSpec) -> list[str]:
    """Return the problems with a spec's data that would end a run before its first step, a line of text each."""
    data = spec.data
    errors: list[DataError] = []
    try:
        manifest = read_data_manifest(data.prepared)
        if manifest is not None:
            check_recipe(data.prepared, manifest, spec)
        else:
            errors += source_errors(data)
            if data.tokenizer:
                read_given_tokenizer(data.tokenizer, data.tokenizer_pattern)
            if data.chat_sources:
                check_template(data)
    # A plan may be made before the data exists, so errors in the data are only warnings.
    except DataError as e:
        errors.append(e)
    return [str(error) for error in errors]


def held_out_share(data: DataSpec) -> str:
    """Return which documents validation has: their number, if the data is prepared."""
    try:
        manifest = read_data_manifest(data.prepared)
    # A damaged manifest is one of the warnings of `data_warnings`.
    except DataError:
        manifest = None
    if manifest is None:
        return f"{data.validation_fraction:.3g} of the documents, chosen by a hash, and at least one"
    held_out = sum(domain.validation_documents for domain in manifest.domains.values())
    documents = held_out + sum(domain.documents for domain in manifest.domains.values())
    return f"{held_out:,} of {documents:,} documents"


def placement_figures(spec: RunSpec, placement: Placement) -> dict[str, Any]:
    """Return the part of a plan that depends only on the spec and the placement: sizes, memory, traffic and layout. If
    the nodes cannot hold all ranks, groups and traffic are those on a single node."""
    cluster, moe, reference = spec.cluster, spec.model.moe, spec.reference_model
    layout = placement.layout or single_node_layout(cluster.max_world_size, cluster.ep)
    start_record = plan_start(spec)
    step, rank_memory = expert_step(spec), compute_memory(spec)
    # With the fewest workers, an elastic run needs the most memory per rank, because the shards are then largest.
    fewest_workers_memory = compute_memory(spec.with_workers(spec.worker_counts[0]))
    ratios = compare_models(spec.model, reference) if reference else {}
    return {
        "spec": spec.model_dump(mode="json"),
        "start": start_record.model_dump(mode="json") if start_record else None,
        "sizes": compute_sizes(spec.model)._asdict(),
        "parts": [part._asdict() for part in model_parts(spec.model)],
        "flops_per_token": flops_per_token(spec.model, spec.attention_length, spec.samples_per_token)._asdict(),
        "parity": {name: comparison.as_json() for name, comparison in ratios.items()},
        "kernel": assumed_kernel(spec),
        "dropped_by_chance": expected_drop_share(moe, spec.tokens_per_micro_batch * moe.heads) if moe else None,
        "expert_step": {**step._asdict(), "intensity": step.intensity} if step else None,
        "memory_per_rank": rank_memory.as_json(),
        "memory_per_rank_of_fewest": fewest_workers_memory.as_json(),
        "pinned_host_memory_per_rank": checkpoint_copy_bytes(spec) if cluster.gpus_per_worker else 0,
        "exchanges": [exchange.as_json() for exchange in all_exchanges(spec_for_layout(spec, layout), layout)],
        "tokens_per_step": spec.tokens_per_step,
        "tokens": spec.tokens_per_step * spec.train.steps,
        "layout": {
            "workers": cluster.workers.max,
            **cluster.mesh_sizes(),
            "experts_per_rank": moe.experts // cluster.ep if moe else 0,
            "expert_groups": layout.groups.ranks,
            "micro_batches_per_worker": spec.train.micro_batches // cluster.workers.max,
            "cpus": cluster.cpus,
            "gpus": cluster.workers.max * cluster.gpus_per_worker,
        },
        "placement": placement.as_dict(),
    }


def estimate_step(spec: RunSpec, layout: Layout | None) -> Estimate | None:
    """Estimate the time of a training step; return None for a run on CPUs, or if the nodes cannot hold the ranks."""
    # A spec describes the speed of its accelerator but not that of its CPUs, so there is no estimate for a run on CPUs.
    return (
        estimate_step_time(spec_for_layout(spec, layout), layout) if layout and spec.cluster.gpus_per_worker else None
    )


def estimate_figures(spec: RunSpec, layout: Layout, step: Estimate) -> dict[str, Any]:
    """Return the estimated times, memory and traffic of a training step, as `mhmoe plan --json` prints them."""
    accelerator, rank_memory = spec.cluster.accelerator, compute_memory(spec).total
    # Scripts read these keys, so the keys must not change when a field of an estimate is renamed.
    return {
        "memory": {
            "needed": rank_memory,
            "there": accelerator.memory,
            "fits": rank_memory <= accelerator.memory,
            "remedies": [{"keys": remedy.keys, "saves": remedy.saved_bytes} for remedy in memory_remedies(spec)],
        },
        "traffic_per_rank": traffic_per_rank(spec, layout),
        "step": {
            "parts": [time._asdict() for time in [*step.compute_times, *step.exchange_times]],
            "longest": {**step.longest_part._asdict(), "remedy": step.longest_part.remedy},
            **_figures(step),
        },
        "dispatches": dispatch_figures(spec, layout, step) if spec.cluster.ep > 1 else {},
    }


def _figures(step: Estimate) -> dict[str, float]:
    """Return the seconds, tokens per second and share of peak FLOPs of a step: with communication and computation one
    after the other (`in_turn`), and with communication hidden behind computation (`overlapped`)."""
    return {
        "seconds_in_turn": step.sequential_seconds,
        "seconds_overlapped": step.overlapped_seconds,
        "tokens_per_s_in_turn": step.tokens / step.sequential_seconds,
        "tokens_per_s_overlapped": step.tokens / step.overlapped_seconds,
        "share_of_peak_flops_in_turn": step.peak_seconds / step.sequential_seconds,
        "share_of_peak_flops_overlapped": step.peak_seconds / step.overlapped_seconds,
    }


def _bytes_by_link(exchanges: list[Exchange]) -> dict[str, float]:
    """Return the mean bytes that a rank sends in a step by class of link (`LinkLoads`), if there are exchanges."""
    link_bytes = [[e.times * sends.mean for sends in e.links] for e in exchanges]
    return dict(zip(LinkLoads._fields, map(sum, zip(*link_bytes, strict=True)), strict=True)) if link_bytes else {}


def traffic_per_rank(spec: RunSpec, layout: Layout) -> dict[str, dict[str, float]]:
    """Return the mean number of bytes that a rank sends in a step, by type of communication and class of link."""
    rows = {"rows to experts and back": _bytes_by_link(dispatch_exchanges(spec, layout))}
    return {**rows, **{e.name: _bytes_by_link([e]) for e in reduction_exchanges(spec, layout)}}


def dispatch_figures(spec: RunSpec, layout: Layout, step: Estimate) -> dict[str, dict[str, Any]]:
    """Return the traffic and times of a run's step for each kind of dispatch, flat and hierarchical."""
    figures = {}
    for name in DISPATCHES:
        # `step` is the estimate for the spec's own dispatch, so only the other dispatch needs a new estimate.
        is_current = name == spec.cluster.dispatch
        cluster = spec.cluster.model_copy(update={"dispatch": name})
        variant = spec if is_current else spec.model_copy(update={"cluster": cluster})
        exchanges = dispatch_exchanges(variant, layout)
        variant_step = step if is_current else estimate_step_time(variant, layout)
        figures[name] = {
            "sent": _bytes_by_link(exchanges),
            "seconds": sum(exchange_time(e, variant, layout).seconds for e in exchanges),
            "seconds_in_turn": variant_step.sequential_seconds,
            "seconds_overlapped": variant_step.overlapped_seconds,
        }
    return figures
