"""`mhmoe bench layer`: what expert layers of equal work cost."""

from typing import Annotated, Literal

import typer
from rich.table import Table

from mhmoe_ray.cli.common import JsonOption, in_bytes, note, out, print_json


def layer(
    tokens: Annotated[int, typer.Option(min=1, help="T")] = 4096,
    d_model: Annotated[int, typer.Option(min=2, help="d")] = 512,
    experts: Annotated[int, typer.Option(min=1, help="E of the plain layer.")] = 8,
    top_k: Annotated[int, typer.Option(min=1, help="k")] = 2,
    d_expert: Annotated[int, typer.Option(min=8, help="f of the plain layer.")] = 2048,
    heads: Annotated[list[int] | None, typer.Option(help="h of a multi-head layer; 2 and 4 by default.")] = None,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of weights and tokens.")] = "bfloat16",
    static: Annotated[bool, typer.Option("--static", help="Also static routing, whose masks grow with T^2.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, each of all layers.")] = 7,
    json: JsonOption = False,
) -> None:
    """Time forward and backward of expert layers of equal multiply-adds and parameters, on this machine's CPU.

    All layers take turns in each round; medians, as ratios to a dense layer of the same multiply-adds.
    """
    import torch
    from pydantic import ValidationError

    from mhmoe_ray.bench.layers import Shape, layer_cases
    from mhmoe_ray.bench.timing import interleaved
    from mhmoe_ray.errors import SpecError

    shape = Shape(tokens, d_model, experts, top_k, d_expert)
    try:
        cases = layer_cases(shape, heads or [2, 4], dtype, static)
    except ValidationError as e:
        why = e.errors()[0]["msg"].removeprefix("Value error, ")
        raise SpecError("bench layer", why, "choose other sizes") from e
    note.print(f"{torch.get_num_threads()} threads, {dtype}, {rounds} rounds of {len(cases)} layers")
    found = interleaved({case.name: case.run for case in cases}, rounds)
    dense, plain = (found[case.name].median for case in cases[:2])
    if json:
        layers = [
            {
                "layer": case.name,
                "spec": case.moe.model_dump(mode="json") if case.moe else None,
                "seconds": found[case.name].seconds,
                "median": found[case.name].median,
                "to_dense": found[case.name].median / dense,
                "to_smoe": found[case.name].median / plain,
                "kept_for_backward": case.kept,
            }
            for case in cases
        ]
        print_json({"shape": shape._asdict(), "dtype": dtype, "threads": torch.get_num_threads(), "layers": layers})
        return
    table = Table(box=None, pad_edge=False)
    for column in ("layer", "E", "k", "f", "median", "to dense", "to SMoE", "kept for backward"):
        table.add_column(column, justify="left" if column == "layer" else "right", no_wrap=True)
    for case in cases:
        moe, median = case.moe, found[case.name].median
        sizes = (moe.experts, moe.top_k, moe.d_expert) if moe else ("", "", top_k * d_expert)
        ratios = (f"{median / dense:.2f}", f"{median / plain:.2f}")
        table.add_row(case.name, *map(str, sizes), f"{median * 1e3:.0f} ms", *ratios, in_bytes(case.kept))
    out.print(table)
