"""`mhmoe plan`: what a spec means, before anything starts."""

from typing import TYPE_CHECKING, Any

from mhmoe_ray.cli.common import JsonOption, SetOption, SpecArg, facts, out, print_json, read_spec

if TYPE_CHECKING:
    from mhmoe_ray.spec import RunSpec


def plan(spec: SpecArg, set_: SetOption = [], json: JsonOption = False) -> None:  # noqa: B006 - typer needs the list
    """Show the resolved spec: parameters, multiply-adds, tokens and the layout of workers."""
    resolved = read_spec(spec, set_)
    if json:
        print_json(as_dict(resolved))
    else:
        show(resolved)


def as_dict(spec: "RunSpec") -> dict[str, Any]:
    """The resolved spec, sizes and layout; rank numbers assume a single node."""
    from mhmoe_ray.model.sizing import sizes
    from mhmoe_ray.placement.groups import expert_groups

    cluster, moe = spec.cluster, spec.model.moe
    groups = expert_groups(["node"] * cluster.workers, cluster.ep)
    return {
        "spec": spec.model_dump(mode="json"),
        "sizes": sizes(spec.model)._asdict(),
        "tokens_per_step": spec.tokens_per_step,
        "tokens": spec.tokens_per_step * spec.train.steps,
        "layout": {
            "workers": cluster.workers,
            "dp": cluster.dp,
            "ep": cluster.ep,
            "experts_per_rank": moe.experts // cluster.ep if moe else 0,
            "expert_groups": groups.ranks,
            "micro_batches_per_worker": spec.train.micro_batches // cluster.workers,
            "cpus": cluster.cpus,
            "gpus": cluster.workers * cluster.gpus_per_worker,
        },
    }


def show(spec: "RunSpec") -> None:
    from mhmoe_ray.spec.cluster import STREAM_CPUS

    planned = as_dict(spec)
    size, layout, model, moe = planned["sizes"], planned["layout"], spec.model, spec.model.moe
    experts = "none"
    if moe:
        kind = f"multi-head, {moe.heads} heads" if moe.heads > 1 else "plain"
        experts = (
            f"{kind}; {model.moe_layers} of {model.layers} layers have {moe.experts} experts of width {moe.d_expert}, "
            f"top {moe.top_k}, {moe.router} router, "
            + (f"capacity factor {moe.capacity_factor:g}" if moe.capacity_factor else "dropless")
        )
    rows = {
        "model": f"{model.backbone}, d {model.d_model}, {model.layers} layers, vocabulary {model.vocab_size}",
        "mixture of experts": experts,
        "parameters": f"{size['parameters']:,}",
        "  of experts": f"{size['expert_parameters']:,}",
        "  active per token": f"{size['active_parameters']:,}",
        "multiply-adds per token": f"{size['macs_per_token']:,} ({size['moe_macs_per_token']:,} in expert layers)",
        "hidden activations": f"{size['hidden_per_token']:,} per token in experts" if moe else None,
        "tokens": f"{planned['tokens']:,} in {spec.train.steps:,} steps of {planned['tokens_per_step']:,}",
        "workers": f"{layout['workers']} = dp {layout['dp']} x ep {layout['ep']}, {_each(spec)} each",
        "CPUs": f"{layout['cpus']}, of which {STREAM_CPUS} for the data stream",
        "experts per rank": f"{layout['experts_per_rank']} of each layer" if moe else None,
        "storage": str(spec.storage),
    }
    out.print(facts(rows, title=spec.name))


def _each(spec: "RunSpec") -> str:
    cpus, gpus = spec.cluster.cpus_per_worker, spec.cluster.gpus_per_worker
    return f"{cpus} CPU" + (f" and {gpus} GPU" if gpus else "")
