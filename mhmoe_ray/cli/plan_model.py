"""The tables of `mhmoe plan --hf`: the cost of a model of the hub on a cluster on paper."""

from typing import Any

from mhmoe_ray.api.model_plan import plan_model
from mhmoe_ray.cli.formats import format_bytes, format_digits, format_seconds
from mhmoe_ray.cli.output import fact_table, out, print_json, print_line, print_table


def show_model_plan(source: str, nodes: int, gpus: int, tokens: float, json: bool) -> None:
    """Print what it costs to train, upcycle and serve a model."""
    plan = plan_model(source, nodes, gpus, tokens)
    if json:
        print_json(plan)
        return
    serving = plan["serving"]
    facts = {
        "parameters": f"{plan['parameters']:,}",
        "  active per token": f"{plan['active_parameters']:,}",
        "planned as": f"a similar decoder of {plan['planned_parameters']:,} parameters"
        if plan["approximated"]
        else None,
        "to serve in bfloat16": f"{format_bytes(serving['weight_bytes'])} of weights, "
        f"{format_bytes(serving['cache_bytes_per_token'])} of cache per token",
        "  replicas": f"{serving['replicas']:,}, with {serving['gpus_per_replica']:,} GPUs each and room for "
        f"{serving['cached_tokens_per_replica']:,} tokens of context",
        "  one sequence": f"at most {serving['tokens_per_s_of_one_sequence_at_most']:,.0f} tokens/s",
    }
    out.print(fact_table(facts, title=plan["source"]))
    print_line(
        f"\nto train on {nodes * gpus:,} H100s, in the fastest setting that fits, also in bfloat16; none is measured"
    )
    columns = ["", "parameters", "active", "memory", "step", "tokens/s", f"GPU-hours for {plan['tokens']:.3g} tokens"]
    ways = plan["ways"]
    rows = [
        [name, f"{way['parameters']:,}", f"{way['active_parameters']:,}", *_costs(way)] for name, way in ways.items()
    ]
    print_table(columns, rows)
    for name, way in ways.items():
        keys = way.get("keys", {})
        text = " ".join(f"{key}={'null' if value is None else str(value).lower()}" for key, value in keys.items())
        print_line(f"{name}: {way.get('problem') or text}")


def _costs(way: dict[str, Any]) -> list[str]:
    if "problem" in way:
        return ["does not fit", "", "", ""]
    return [
        format_bytes(way["memory_per_gpu"]),
        " to ".join(map(format_seconds, way["step_seconds"])),
        " to ".join(f"{speed:,.0f}" for speed in way["tokens_per_s"]),
        " to ".join(map(format_digits, way["gpu_hours"])),
    ]
