"""`mhmoe plan`: what a spec means, before anything starts."""

from typing import TYPE_CHECKING, Any

from mhmoe_ray.cli.common import JsonOption, SetOption, SpecArg, facts, out, print_json, read_spec

if TYPE_CHECKING:
    from mhmoe_ray.spec import RunSpec


def plan(spec: SpecArg, set_: SetOption = [], json: JsonOption = False) -> None:  # noqa: B006 - typer needs the list
    """Show the resolved spec: sizes, ratios to its reference, memory and traffic of a rank, the layout of workers."""
    from mhmoe_ray.cli import plan_tables

    resolved = read_spec(spec, set_)
    if json:
        print_json(as_dict(resolved))
        return
    show(resolved)
    for title, table in plan_tables.tables(resolved):
        out.print(f"\n{title}", style="bold")
        out.print(table)


def as_dict(spec: "RunSpec") -> dict[str, Any]:
    """The resolved spec and all that follows from it; rank numbers assume a single node."""
    from mhmoe_ray.placement.groups import expert_groups
    from mhmoe_ray.planner.memory import memory
    from mhmoe_ray.planner.parity import parity
    from mhmoe_ray.planner.sizes import flops_per_token, parts, sizes
    from mhmoe_ray.planner.step import expert_step
    from mhmoe_ray.planner.traffic import exchanges

    cluster, moe, reference = spec.cluster, spec.model.moe, spec.reference_model
    groups = expert_groups(["node"] * cluster.workers.max, cluster.ep)
    step, held = expert_step(spec), memory(spec)
    ratios = parity(spec.model, reference) if reference else {}
    return {
        "spec": spec.model_dump(mode="json"),
        "sizes": sizes(spec.model)._asdict(),
        "parts": [part._asdict() for part in parts(spec.model)],
        "flops_per_token": flops_per_token(spec.model, spec.data.seq_len)._asdict(),
        "parity": {name: {**c._asdict(), "ratio": c.ratio} for name, c in ratios.items()},
        "expert_step": {**step._asdict(), "intensity": step.intensity} if step else None,
        "memory_per_rank": {**held._asdict(), "total": held.total},
        "exchanges": [{**e._asdict(), "sent_per_step": e.sent_per_step} for e in exchanges(spec)],
        "tokens_per_step": spec.tokens_per_step,
        "tokens": spec.tokens_per_step * spec.train.steps,
        "layout": {
            "workers": cluster.workers.max,
            "dp": cluster.dp,
            "ep": cluster.ep,
            "experts_per_rank": moe.experts // cluster.ep if moe else 0,
            "expert_groups": groups.ranks,
            "micro_batches_per_worker": spec.train.micro_batches // cluster.workers.max,
            "cpus": cluster.cpus,
            "gpus": cluster.workers.max * cluster.gpus_per_worker,
        },
    }


def show(spec: "RunSpec") -> None:
    """The facts that `submit` prints too."""
    from mhmoe_ray.cli.common import in_bytes
    from mhmoe_ray.planner.parity import parity
    from mhmoe_ray.planner.presets import about
    from mhmoe_ray.planner.sizes import flops_per_token, sizes
    from mhmoe_ray.planner.units import FLOAT32
    from mhmoe_ray.spec.cluster import STREAM_CPUS

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
    most = "at most " if spec.data.packing == "best_fit" else ""  # padding is among them
    checkpoint = 3 * FLOAT32 * size.parameters  # weights and two moments
    rows = {
        "preset": f"{spec.origin}: {about(spec.origin)}" if spec.origin else None,
        "model": f"{model.backbone}, d {model.d_model}, {model.layers} layers, vocabulary {model.vocab_size}",
        "mixture of experts": experts,
        "parameters": f"{size.parameters:,}",
        "  of experts": f"{size.expert_parameters:,}" if moe else None,
        "  active per token": f"{size.active_parameters:,} at most" if moe else None,
        "multiply-adds per token": f"{size.macs_per_token:,} ({size.moe_macs_per_token:,} in expert layers)",
        "to its reference": ratios,
        "tokens": f"{most}{spec.tokens_per_step * spec.train.steps:,} in {spec.train.steps:,} steps "
        f"of {spec.tokens_per_step:,}; {training * spec.tokens_per_step * spec.train.steps:.3g} FLOPs in all",
        "checkpoints": f"{spec.train.steps // spec.train.checkpoint_every:,}, one every "
        f"{spec.train.checkpoint_every:,} steps, {in_bytes(checkpoint)} each",
        "workers": f"{cluster.workers.max} = dp {cluster.dp} x ep {cluster.ep}, {_each(spec)} each"
        + (f"; or {', '.join(map(str, fewer))}" if (fewer := spec.worker_counts[-2::-1]) else ""),
        "CPUs": f"{cluster.cpus}, of which {STREAM_CPUS} for the data stream",
        "experts per rank": f"{moe.experts // cluster.ep} of each layer" if moe else None,
        "storage": str(spec.storage),
    }
    out.print(facts(rows, title=spec.name))


def _each(spec: "RunSpec") -> str:
    cpus, gpus = spec.cluster.cpus_per_worker, spec.cluster.gpus_per_worker
    return f"{cpus} CPU" + (f" and {gpus} GPU" if gpus else "")
