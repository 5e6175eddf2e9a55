"""`mhmoe plan`: show the sizes, memory, traffic and placement of a spec's run before it starts."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import mhmoe_ray as mh
from mhmoe_ray.cli import options
from mhmoe_ray.cli.formats import format_bytes
from mhmoe_ray.cli.output import fact_table, out, print_json, print_line, print_note, print_untruncated, show_activity

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.table import Table

    from mhmoe_ray.planner.estimate import Estimate
    from mhmoe_ray.spec import RunSpec
    from mhmoe_ray.spec.train import TrainSpec


def plan(
    spec: Annotated[
        Path | None, typer.Argument(help="A spec, for example jobs/quickstart.yaml.", show_default=False)
    ] = None,
    set_: options.SetOption = [],  # noqa: B006 - typer needs the list
    storage: options.SpecStorageOption = None,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Plan for this number of nodes on paper, and estimate step times.")
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="GPUs of each node on paper, with one worker per GPU.")
    ] = None,
    search: Annotated[
        bool, typer.Option("--search", help="List the fastest settings that fit the cluster on paper.")
    ] = False,
    write: Annotated[
        Path | None, typer.Option(help="Write the spec with the first setting of --search to this new file.")
    ] = None,
    hf: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Plan a model of the hub (ORG/NAME) or a folder with config.json instead."),
    ] = None,
    tokens: Annotated[float, typer.Option(min=1, help="Training tokens for the GPU-hours of --hf.")] = 1e9,
    address: options.AddressOption = None,
    json: options.JsonOption = False,
) -> None:
    """Show the resolved spec: sizes, ratios to its reference, memory and traffic per rank, and placement of its
    workers.

    By default this is a forecast for the cluster that a run would go to, if that cluster is running. With --nodes and
    --gpus it is a plan for a cluster on paper, whose other properties are the spec's cluster.accelerator and
    cluster.network. Keys that change no loss are adapted to these GPUs, and printed. With --search it compares all
    values of these keys and of precisions, and lists the settings with the shortest estimated steps.
    """
    show_activity("planning")
    from mhmoe_ray.api.placement import choose_for_cluster, forecast_placement, placement_remarks, planned_placement
    from mhmoe_ray.api.plan import data_warnings, estimate_step, plan_figures
    from mhmoe_ray.cli import plan_tables
    from mhmoe_ray.planner.adapt import changed_keys, format_keys
    from mhmoe_ray.planner.remedies import residual_advice
    from mhmoe_ray.planner.search import choose_on_paper

    if (nodes is None) != (gpus is None) or (nodes and address):
        raise typer.BadParameter("a cluster on paper needs both --nodes and --gpus, and takes no --address")
    if (spec is None) == (hf is None) or (hf and not nodes):
        raise typer.BadParameter("give a spec, or --hf with --nodes and --gpus")
    if hf and nodes and gpus:
        from mhmoe_ray.cli.plan_model import show_model_plan

        show_model_plan(hf, nodes, gpus, tokens, json)
        return
    assert spec is not None
    if (search and not nodes) or (write and not search):
        raise typer.BadParameter("--search needs a cluster on paper (--nodes and --gpus), and --write needs --search")
    overrides = options.with_storage(set_, storage)
    if nodes and gpus:
        # The micro-batches of a preset are as large as a GPU allows.
        own_spec = mh.load_spec(spec, [*overrides, "cluster.gpus_per_worker=1"])
        if search:
            from mhmoe_ray.cli.plan_search import show_settings

            show_settings(own_spec, nodes, gpus, write, json)
            return
        resolved, chosen_keys = choose_on_paper(own_spec, nodes, gpus)
        placement = planned_placement(resolved, nodes, gpus)
    else:
        own_spec = mh.load_spec(spec, overrides)
        resolved, chosen_keys = choose_for_cluster(own_spec, address)
        placement = forecast_placement(resolved, address, print_note)
    warnings = data_warnings(resolved)
    for line in warnings:
        print_note(f"warning: {line}")
    if json:
        print_json(plan_figures(resolved, placement, warnings, chosen_keys))
        return
    layout, step_estimate = placement.layout, estimate_step(resolved, placement.layout)
    print_summary(resolved, step_estimate)
    if chosen_keys:
        out.print("\nchosen for these GPUs; a step has the same samples", style="bold")
        for line in format_keys(changed_keys(own_spec, chosen_keys)):
            print_line(line.replace("=", ": "))
        words = " ".join(f"--set {line}" for line in format_keys(chosen_keys))
        print_line(f"to keep these values and the defaults, write them into the spec, or give: {words}")
    _print_tables(plan_tables.tables(resolved, placement))
    for line in placement_remarks(placement):
        print_line(line)
    if advice := residual_advice(resolved):
        print_line(advice)
    if nodes and layout and step_estimate:
        out.print("\nestimated for that cluster, and not checked on GPUs", style="bold")
        for line in plan_tables.summary_lines(resolved, step_estimate):
            out.print(line)
        _print_tables(plan_tables.estimate_tables(resolved, layout, step_estimate))


def _print_tables(tables: "Iterable[tuple[str, Table]]") -> None:
    for title, table in tables:
        out.print(f"\n{title}", style="bold")
        print_untruncated(table)


def print_summary(spec: "RunSpec", step_estimate: "Estimate | None") -> None:
    """Print the table with which `mhmoe plan` and `mhmoe submit` begin; an estimated step gives its cost."""
    from mhmoe_ray.api.plan import held_out_share
    from mhmoe_ray.checkpoint.start.record import plan_start
    from mhmoe_ray.cli.plan_tables import format_cost
    from mhmoe_ray.planner.family import plan_of
    from mhmoe_ray.planner.match import compare_models, experts_without_ep
    from mhmoe_ray.planner.memory import checkpoint_bytes
    from mhmoe_ray.planner.resolve import preset_description
    from mhmoe_ray.planner.sizes import compute_sizes, trained_sizes, training_flops
    from mhmoe_ray.spec.cluster import STREAM_CPUS, format_mesh

    size, cluster, model, moe = compute_sizes(spec.model), spec.cluster, spec.model, spec.model.moe
    experts = "none"
    if moe:
        kind = f"multi-head, {moe.heads} heads" if moe.heads > 1 else "plain"
        if moe.d_sub_token is not None:
            kind += f", sub-tokens of width {moe.d_sub_token}"
        routing = f"top {moe.top_k}, {moe.router} router, " + (
            f"capacity factor {moe.capacity_factor:g}" if moe.capacity_factor else "dropless"
        )
        if moe.router == "smear":
            routing = "which router smear averages into one for each sample"
        experts = (
            f"{kind}; {model.moe_layers} of {model.layers} layers have {moe.experts} experts of width {moe.d_expert}, "
            f"{routing}"
        )
    ratios = None
    if spec.reference and (reference := spec.reference_model):
        comparison = compare_models(model, reference)
        ratios = (
            f"{comparison['parameters'].ratio:.3f} of its parameters, "
            f"{comparison['multiply-adds per token'].ratio:.3f} of its multiply-adds ({spec.reference.name})"
        )
        if (matching_experts := experts_without_ep(spec)) is not None:
            ratios += f"; {matching_experts:,} experts would match it, but cluster.ep {cluster.ep} does not divide them"
    # Best-fit packing pads samples. The number of tokens below counts padding as tokens, so it is an upper limit.
    qualifier = "at most " if spec.data.packing == "best_fit" else ""
    tokens = spec.tokens_per_step * spec.train.steps
    start_record = plan_start(spec)
    rows = {
        "preset": f"{spec.origin}: {preset_description(spec.origin)}" if spec.origin else None,
        "start": "\n".join(start_record.lines()) if start_record else None,
        "model": f"{model.backbone}, d {model.d_model}, {model.layers} layers"
        + (f", vocabulary {model.vocab_size}" if model.vocab_size else ""),
        **plan_of(model).summary(spec),
        "micro-batch": _parts(spec),
        "mixture of experts": experts,
        "parameters": f"{size.parameters:,}",
        "  of experts": f"{size.expert_parameters:,}" if moe else None,
        "  trained": _adapter(spec, trained_sizes(spec).parameters / size.parameters),
        "  active per token": f"{size.active_parameters:,} at most" if moe else None,
        "multiply-adds per token": f"{size.macs_per_token:,} ({size.moe_macs_per_token:,} in expert layers)",
        "averages of experts": _merging(spec),
        "static routing": _static_routing(spec),
        "kernel": _kernel(spec),
        "to its reference": ratios,
        "tokens": f"{qualifier}{tokens:,} in {spec.train.steps:,} steps "
        f"of {spec.tokens_per_step:,}; {training_flops(spec) * tokens:.3g} FLOPs in all",
        "held out": held_out_share(spec.data),
        "learning rate": _learning_rate(spec.train),
        "checkpoints": f"{_checkpoints(spec.train)}, {format_bytes(checkpoint_bytes(spec))} each",
        # The slice leaves out the largest number of workers, with which the text starts.
        "workers": f"{cluster.workers.max} = {format_mesh(cluster.mesh_sizes())}, {_worker_resources(spec)} each"
        + (f"; or {', '.join(map(str, smaller_counts))}" if (smaller_counts := spec.worker_counts[-2::-1]) else ""),
        "CPUs": f"{cluster.cpus}, of which {STREAM_CPUS} for the data stream",
        "on GPUs": _gpu_settings(spec) if cluster.gpus_per_worker else None,
        "cost": format_cost(spec, step_estimate) if step_estimate else None,
        "experts per rank": f"{moe.experts // cluster.ep} of each layer" if moe else None,
        "storage": str(spec.storage),
    }
    out.print(fact_table(rows, title=spec.name))


def _adapter(spec: "RunSpec", share: float) -> str | None:
    adapter = spec.train.adapter
    if adapter is None:
        return None
    targets = ", ".join(adapter.matched_targets(spec.model))
    return f"{share:.2%} of them, an adapter of rank {adapter.rank} for {targets}"


def _gpu_settings(spec: "RunSpec") -> str:
    """Return the line about settings that have other defaults on GPUs."""
    rows = spec.train.loss_chunk_rows
    parts = [f"strategy {spec.cluster.strategy}", f"blocks are {'' if spec.train.compile else 'not '}compiled"]
    if spec.train.recompute != "none":
        parts.append(f"recompute {spec.train.recompute}")
    if spec.model.family.predicts_next_token:
        parts.append(f"loss in chunks of {rows:,} tokens" if rows else "loss from all logits")
    if spec.cluster.strategy == "fsdp":
        parts.append(f"gradients reduced after each {spec.cluster.reduce_after.replace('_', '-')}")
    return ", ".join(parts)


def _merging(spec: "RunSpec") -> str | None:
    """Return the line about the cost of averaging experts with router `smear`; None for other routers."""
    from mhmoe_ray.planner.sizes import merge_macs

    macs = spec.model.moe_layers * merge_macs(spec.model)
    if not macs:
        return None
    return (
        f"{macs:,} multiply-adds per sample; {spec.samples_per_micro_batch:,} samples in a micro-batch, that is "
        f"{round(macs * spec.samples_per_token):,} per token in addition"
    )


def _parts(spec: "RunSpec") -> str | None:
    """Return the line about the parts of a micro-batch, which have one objective each; None without parts."""
    if not spec.data.parts:
        return None
    parts = (f"{part.samples} {part.name} ({part.objective.replace('_', ' ')})" for part in spec.parts)
    return ", ".join(parts)


def _learning_rate(train: "TrainSpec") -> str:
    if train.warmup_steps <= train.steps:
        text = f"{train.lr:g} from step {train.warmup_steps:,} on"
        if train.schedule == "constant":
            return text
        end = "" if train.schedule_steps is None else f" at step {train.schedule_steps:,}"
        if train.decay_steps is not None:
            decay_text = f"over the {train.decay_steps:,} steps up to step {train.last_decay_step:,}"
            return f"{text}, down to {train.min_lr:g} {decay_text}"
        return f"{text}, down to {train.min_lr:g}{end}" + (" along a cosine" if train.schedule == "cosine" else "")
    peak_lr, warmup = train.lr * train.steps / train.warmup_steps, train.warmup_steps
    return f"{peak_lr:.2g} at most, not {train.lr:g}: all {train.steps:,} steps are part of a warm-up of {warmup:,}"


def _checkpoints(train: "TrainSpec") -> str:
    # The last step always has a checkpoint, so the division is rounded up.
    count, remainder = -(-train.steps // train.checkpoint_every), train.steps % train.checkpoint_every
    if count == 1:
        return "1, at the end"
    text = f"{count:,}, one every {train.checkpoint_every:,} steps" + (" and one at the end" if remainder else "")
    if train.keep_checkpoints and train.keep_checkpoints < count:
        text += f", of which the newest {train.keep_checkpoints:,} and the best stay"
    return text


def _static_routing(spec: "RunSpec") -> str | None:
    """Return the line about expert capacity and the expected share of dropped routes; None without a capacity."""
    from mhmoe_ray.planner.expert_step import expected_drop_share

    moe = spec.model.moe
    if moe is None:
        return None
    rows = spec.tokens_per_micro_batch * moe.heads
    if (expert_capacity := moe.expert_capacity(rows)) is None:
        return None
    # A token without a random second expert takes up less capacity, so fewer routes are dropped than computed.
    qualifier = "at most " if moe.second_expert == "random" else ""
    return (
        f"expert capacity is {expert_capacity:,} for the {rows:,} rows of a micro-batch; even and random routing would "
        f"drop {qualifier}{expected_drop_share(moe, rows):.1%} of the routes"
    )


def _kernel(spec: "RunSpec") -> str | None:
    """Return the line about the kernel that `auto` stands for in the memory estimate; None without such a choice."""
    from mhmoe_ray.planner.kernels import assumed_kernel, may_use_cpp

    if spec.model.moe is None or spec.model.moe.kernel != "auto" or spec.model.moe.router == "smear":
        return None
    if spec.train.adapter:
        return "a loop over experts, whose backward skips frozen weights"
    remark = "; where CPUs have AMX it is cpp, which keeps less" if may_use_cpp(spec) else ""
    return f"auto, taken to be {assumed_kernel(spec)}{remark}"


def _worker_resources(spec: "RunSpec") -> str:
    cpus, gpus = spec.cluster.cpus_per_worker, spec.cluster.gpus_per_worker
    return f"{cpus} CPU" + (f" and {gpus} GPU" if gpus else "")
