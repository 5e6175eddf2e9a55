"""`mhmoe plan`: show what a spec means before anything starts."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mhmoe_ray.cli.common import (
    AddressOption,
    JsonOption,
    SetOption,
    SpecArg,
    facts,
    note,
    out,
    print_json,
    print_whole,
    read_spec,
)
from mhmoe_ray.cli.plan_placement import Placement

if TYPE_CHECKING:
    from mhmoe_ray.planner.estimate import Estimate
    from mhmoe_ray.planner.traffic import Links
    from mhmoe_ray.spec import RunSpec
    from mhmoe_ray.spec.train import TrainSpec


def plan(
    spec: SpecArg,
    set_: SetOption = [],  # noqa: B006 - typer needs the list
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Plan for so many nodes on paper, with estimated times of a step.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs of each of them, a worker on each.")] = None,
    address: AddressOption = None,
    json: JsonOption = False,
) -> None:
    """Show the resolved spec: sizes, ratios to its reference, memory and traffic per rank, and placement of its
    workers.

    By default this is a forecast for the cluster that a run would go to, if one runs. With --nodes and --gpus it is a
    plan for a cluster on paper, whose other properties are the spec's cluster.accelerator and cluster.network.
    """
    from mhmoe_ray.cli import plan_estimate, plan_tables
    from mhmoe_ray.cli.plan_placement import placement, placement_on_paper, said_of

    if (nodes is None) != (gpus is None) or (nodes and address):
        raise typer.BadParameter("a cluster on paper is --nodes and --gpus, both of them and no --address")
    if nodes and gpus:
        own = [f"cluster.workers={nodes * gpus}", "cluster.gpus_per_worker=1"]
        resolved = read_spec(spec, [*set_, *own])
        placed = placement_on_paper(resolved, nodes, gpus)
    else:
        resolved = read_spec(spec, set_)
        placed = placement(resolved, address)
    layout, found = placed.layout, plan_estimate.estimated(resolved, placed.layout)
    warnings = data_warnings(resolved)
    for line in warnings:
        note.print(f"warning: {line}", soft_wrap=True)
    if json:
        estimate = plan_estimate.as_dict(resolved, layout, found) if nodes and layout and found else None
        print_json({**as_dict(resolved, placed), "estimate": estimate, "warnings": warnings})
        return
    show(resolved, found)
    for title, table in plan_tables.tables(resolved, placed):
        out.print(f"\n{title}", style="bold")
        print_whole(table)
    for line in said_of(placed):
        out.print(line, soft_wrap=True)
    if nodes and layout and found:
        out.print("\nestimated for that cluster, and not checked on GPUs", style="bold")
        for line in plan_estimate.said_of(resolved, found):
            out.print(line)
        for title, table in plan_estimate.tables(resolved, layout, found):
            out.print(f"\n{title}", style="bold")
            print_whole(table)


def data_warnings(spec: "RunSpec") -> list[str]:
    """Return the problems that would end a run before its first step.

    These are missing text and tokenizers on this machine, and a prepared folder that was made with other settings. They
    are warnings, because a plan may be made before the data exists.
    """
    from mhmoe_ray.data.shards.manifest import check_recipe, read_data_manifest
    from mhmoe_ray.data.sources.find import problems
    from mhmoe_ray.data.tokenizer.load import read_given
    from mhmoe_ray.errors import DataError

    data = spec.data
    found: list[DataError] = []
    try:
        manifest = read_data_manifest(data.prepared)
        if manifest is not None:
            check_recipe(data.prepared, manifest, spec)
        else:
            found += problems(data)
            if data.tokenizer:
                read_given(data.tokenizer, data.tokenizer_pattern)
    except DataError as e:
        found.append(e)
    return [str(error) for error in found]


def as_dict(spec: "RunSpec", placed: "Placement") -> dict[str, Any]:
    """Return the resolved spec and everything that follows from it, for JSON.

    Without a layout of the ranks, groups and links are those of a single node.
    """
    from mhmoe_ray.cli.plan_placement import placed_spec
    from mhmoe_ray.planner.expert_step import assumed_kernel, dropped_by_chance, expert_step
    from mhmoe_ray.planner.match import parity
    from mhmoe_ray.planner.memory import checkpoint_copy, memory
    from mhmoe_ray.planner.placement import on_one_node
    from mhmoe_ray.planner.sizes import flops_per_token, parts, sizes
    from mhmoe_ray.planner.traffic import exchanges

    cluster, moe, reference = spec.cluster, spec.model.moe, spec.reference_model
    layout = placed.layout or on_one_node(cluster.world, cluster.ep)
    step, held = expert_step(spec), memory(spec)
    fewest = memory(spec.with_workers(spec.worker_counts[0]))
    ratios = parity(spec.model, reference) if reference else {}
    return {
        "spec": spec.model_dump(mode="json"),
        "sizes": sizes(spec.model)._asdict(),
        "parts": [part._asdict() for part in parts(spec.model)],
        "flops_per_token": flops_per_token(spec.model, spec.data.seq_len)._asdict(),
        "parity": {name: {**c._asdict(), "ratio": c.ratio} for name, c in ratios.items()},
        "kernel": assumed_kernel(spec),
        "dropped_by_chance": dropped_by_chance(moe, spec.tokens_per_micro_batch * moe.heads) if moe else None,
        "expert_step": {**step._asdict(), "intensity": step.intensity} if step else None,
        "memory_per_rank": {**held._asdict(), "total": held.total},
        "memory_per_rank_of_fewest": {**fewest._asdict(), "total": fewest.total},
        "pinned_host_memory_per_rank": checkpoint_copy(spec) if cluster.gpus_per_worker else 0,
        "exchanges": [
            {**e._asdict(), "sent_per_step": e.sent_per_step, "links": _links(e.links)}
            for e in exchanges(placed_spec(spec, layout), layout)
        ],
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
        "placement": placed.as_dict(),
    }


def _links(links: "Links") -> dict[str, Any]:
    return {name: sends._asdict() for name, sends in links._asdict().items()}


def show(spec: "RunSpec", found: "Estimate | None") -> None:
    """Print the facts that `submit` prints too.

    Args:
        spec: spec of a run.
        found: estimate of a step, for its cost; None if there is no estimate.
    """
    from mhmoe_ray.cli.common import in_bytes
    from mhmoe_ray.cli.plan_estimate import cost
    from mhmoe_ray.planner.match import parity, without_ep
    from mhmoe_ray.planner.memory import CHECKPOINT_BYTES
    from mhmoe_ray.planner.resolve import about
    from mhmoe_ray.planner.sizes import flops_per_token, sizes
    from mhmoe_ray.spec.cluster import STREAM_CPUS, mesh_in_words

    size, cluster, model, moe = sizes(spec.model), spec.cluster, spec.model, spec.model.moe
    training = flops_per_token(model, spec.data.seq_len).training
    experts = "none"
    if moe:
        kind = f"multi-head, {moe.heads} heads" if moe.heads > 1 else "plain"
        experts = (
            f"{kind}; {model.moe_layers} of {model.layers} layers have {moe.experts} experts of width {moe.d_expert}, "
            f"top {moe.top_k}, {moe.router} router, "
            + (f"capacity factor {moe.capacity_factor:g}" if moe.capacity_factor else "dropless")
        )
    ratios = None
    if spec.reference and (reference := spec.reference_model):
        compared = parity(model, reference)
        ratios = (
            f"{compared['parameters'].ratio:.3f} of its parameters, "
            f"{compared['multiply-adds per token'].ratio:.3f} of its multiply-adds ({spec.reference.name})"
        )
        if (others := without_ep(spec)) is not None:
            ratios += f"; {others:,} experts would match it, but cluster.ep {cluster.ep} does not divide them"
    most = "at most " if spec.data.packing == "best_fit" else ""  # padding is among them
    rows = {
        "preset": f"{spec.origin}: {about(spec.origin)}" if spec.origin else None,
        "model": f"{model.backbone}, d {model.d_model}, {model.layers} layers, vocabulary {model.vocab_size}",
        "mixture of experts": experts,
        "parameters": f"{size.parameters:,}",
        "  of experts": f"{size.expert_parameters:,}" if moe else None,
        "  active per token": f"{size.active_parameters:,} at most" if moe else None,
        "multiply-adds per token": f"{size.macs_per_token:,} ({size.moe_macs_per_token:,} in expert layers)",
        "static routing": _static_routing(spec),
        "kernel": _kernel(spec),
        "to its reference": ratios,
        "tokens": f"{most}{spec.tokens_per_step * spec.train.steps:,} in {spec.train.steps:,} steps "
        f"of {spec.tokens_per_step:,}; {training * spec.tokens_per_step * spec.train.steps:.3g} FLOPs in all",
        "learning rate": _learning_rate(spec.train),
        "checkpoints": f"{_checkpoints(spec.train)}, {in_bytes(CHECKPOINT_BYTES * size.parameters)} each",
        "workers": f"{cluster.workers.max} = {mesh_in_words(cluster.mesh_sizes())}, {_each(spec)} each"
        + (f"; or {', '.join(map(str, fewer))}" if (fewer := spec.worker_counts[-2::-1]) else ""),
        "CPUs": f"{cluster.cpus}, of which {STREAM_CPUS} for the data stream",
        "cost": cost(spec, found) if found else None,
        "experts per rank": f"{moe.experts // cluster.ep} of each layer" if moe else None,
        "storage": str(spec.storage),
    }
    out.print(facts(rows, title=spec.name))


def _learning_rate(train: "TrainSpec") -> str:
    if train.warmup_steps <= train.steps:
        return f"{train.lr:g} from step {train.warmup_steps:,} on, down to {train.min_lr:g}"
    reached, warmup = train.lr * train.steps / train.warmup_steps, train.warmup_steps
    return f"{reached:.2g} at most, not {train.lr:g}: all {train.steps:,} steps are of a warm-up of {warmup:,}"


def _checkpoints(train: "TrainSpec") -> str:
    count, rest = -(-train.steps // train.checkpoint_every), train.steps % train.checkpoint_every
    if count == 1:
        return "1, at the end"
    said = f"{count:,}, one every {train.checkpoint_every:,} steps" + (" and one at the end" if rest else "")
    if train.keep_checkpoints and train.keep_checkpoints < count:
        said += f", of which the newest {train.keep_checkpoints:,} and the best stay"
    return said


def _static_routing(spec: "RunSpec") -> str | None:
    from mhmoe_ray.planner.expert_step import dropped_by_chance

    moe = spec.model.moe
    if moe is None:
        return None
    rows = spec.tokens_per_micro_batch * moe.heads
    if (places := moe.places(rows)) is None:
        return None
    most = "at most " if moe.second_expert == "random" else ""  # a second choice that is left out leaves its place
    return (
        f"an expert has {places:,} places for the {rows:,} rows of a micro-batch; of choices made evenly and at random "
        f"{most}{dropped_by_chance(moe, rows):.1%} would be dropped"
    )


def _kernel(spec: "RunSpec") -> str | None:
    """Return the kernel that memory is computed for, if the spec leaves it open ("auto"); otherwise None."""
    from mhmoe_ray.planner.expert_step import assumed_kernel, may_be_compiled

    if spec.model.moe is None or spec.model.moe.kernel != "auto":
        return None
    less = "; where CPUs have AMX it is cpp, which keeps less" if may_be_compiled(spec) else ""
    return f"auto, taken to be {assumed_kernel(spec)}{less}"


def _each(spec: "RunSpec") -> str:
    cpus, gpus = spec.cluster.cpus_per_worker, spec.cluster.gpus_per_worker
    return f"{cpus} CPU" + (f" and {gpus} GPU" if gpus else "")
