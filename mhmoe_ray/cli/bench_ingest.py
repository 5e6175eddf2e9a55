"""`mhmoe bench ingest`: text to shards, and shards to micro-batches, beside other packages."""

from typing import Annotated

import typer

from mhmoe_ray.cli import bench_tables as tables
from mhmoe_ray.cli.common import (
    JsonOption,
    SetOption,
    SpecArg,
    in_bytes,
    note,
    number_table,
    out,
    print_json,
    read_spec,
)


def ingest(
    spec: SpecArg,
    set_: SetOption = [],  # noqa: B006 - typer needs the list
    peers: Annotated[bool, typer.Option("--peers", help="Beside datasets and mosaicml-streaming.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Of each, in turn.")] = 3,
    processes: Annotated[int, typer.Option(min=1, help="Of each.")] = 2,
    json: JsonOption = False,
) -> None:
    """Time the preparation of a spec's text, and the stream of its training, each time in new processes.

    The spec names its tokenizer: training one is not measured. Text is prepared anew in a temporary folder; the stream
    is of the spec's own prepared data, all of its train.steps. With --json the table goes to stderr.
    """
    from mhmoe_ray.bench.ingest import CONTESTANTS, OURS, contest
    from mhmoe_ray.bench.timing import there
    from mhmoe_ray.data.shards.manifest import prepared_for
    from mhmoe_ray.errors import SpecError

    resolved = read_spec(spec, set_)
    if resolved.data.tokenizer is None:
        fix = "prepare it, set data.tokenizer to the tokenizer.json in there and data.prepared to another folder"
        raise SpecError("bench ingest", "the spec has no data.tokenizer", fix)
    prepared_for(resolved)
    names = there({name: one.package for name, one in CONTESTANTS.items()}, note.print) if peers else list(OURS)
    figures = list(contest(resolved, names, rounds, processes, note.print))
    rows = []
    for f in figures:
        seconds, first = f.median("seconds"), f.rounds[0]
        rate = f"{first['micro_batches'] / seconds:,.0f} micro-batches/s" if "micro_batches" in first else ""
        if "tokens" in first:
            rate = f"{first['tokens'] / seconds:,.0f} tokens/s"
        peak = in_bytes(round(f.median("peak_bytes"))) if "peak_bytes" in first else ""
        rows.append([f.name, f"{seconds:.1f} s", rate, f"{f.to_ours:.2f}", peak])
    columns = ["", "median", "", "time to ours", "largest process"]
    b, length = resolved.train.micro_batch_size, resolved.data.seq_len
    title = f"{processes} processes each, micro-batches of {b} x {length:,} tokens; {rounds} rounds in turn"
    tables.show(note if json else out, [(title, number_table(columns, rows))])
    if json:
        found = {f.name: {"rounds": f.rounds, "to_ours": f.to_ours} for f in figures}
        print_json({"processes": processes, "micro_batch_size": b, "seq_len": length, "figures": found})
