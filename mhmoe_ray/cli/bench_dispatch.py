"""`mhmoe bench dispatch`: rows to experts on another node, flat and hierarchical."""

from typing import Annotated

import typer

from mhmoe_ray.cli import bench_tables as tables
from mhmoe_ray.cli.common import JsonOption, in_bytes, in_seconds, note, number_table, out, print_json


def dispatch(
    tokens: Annotated[int, typer.Option(min=1, help="T, of each rank.")] = 512,
    rounds: Annotated[int, typer.Option(min=1, help="Of each, in turn.")] = 9,
    slow_link: Annotated[
        str | None,
        typer.Option(metavar="RATE", help="Join the nodes by a link of this rate, such as 200mbit (Linux, root)."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Time a forward and backward pass of expert layers through flat and hierarchical dispatch, over two nodes of two
    ranks made up of processes of this machine, on its CPU.

    Bytes are those of rows that dispatch sends from node to node; with --slow-link those that crossed the link, with
    all headers. Beside their ratio stands the one that the drawn routes demand. The link joins two network namespaces,
    which are removed at the end. With --json the table goes to stderr.
    """
    from mhmoe_ray.bench import timing
    from mhmoe_ray.bench.dispatch.measure import measure

    figures = measure(tokens, rounds, slow_link)
    rows = []
    for f in figures:
        sizes = (f.moe.heads, f.moe.experts, f.moe.top_k, f.width)
        sent = (in_bytes(round(f.flat.bytes)), in_bytes(round(f.hierarchical.bytes)))
        ratios = (f.hierarchical.bytes / f.flat.bytes, f.expected.hierarchical / f.expected.flat)
        times = (in_seconds(f.flat.median), in_seconds(f.hierarchical.median))
        time_ratio = f"{f.hierarchical.median / f.flat.median:.2f}"
        rows.append([f.name, *map(str, sizes), *sent, *(f"{r:.3f}" for r in ratios), *times, time_ratio])
    columns = ["", "h", "E", "k", "D", "flat", "hierarchical", "ratio", "expected", "flat", "hierarchical", "ratio"]
    where = timing.find("cpu")
    link = f"a link of {slow_link}" if slow_link else "one machine"
    title = (
        f"{where.name}, 4 ranks of 1 thread, bfloat16, {tokens:,} tokens a rank, over {link}\n"
        f"bytes between the nodes, then time, of a forward and backward pass; medians of {rounds} rounds in turn"
    )
    tables.show(note if json else out, [(title, number_table(columns, rows))])
    if json:
        found = [f.as_json() for f in figures]
        print_json({"machine": where.name, "tokens": tokens, "rounds": rounds, "link": slow_link, "layers": found})
