"""`mhmoe bench`: measurements, compared side by side within one command.

`layer` and `serve` have files of their own. Commands in this file: `train`, a whole training step of models of equal
work; `run`, the overhead of a run beside its steps; `dispatch`, sending rows to experts on another node; `checkpoint`,
how long saving holds up training; `ingest`, from text to shards and from shards to micro-batches; `commands`, how long
a user waits for the command line.
"""

import os
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

import typer

from mhmoe_ray.cli import bench_layer, bench_serve
from mhmoe_ray.cli import bench_tables as tables
from mhmoe_ray.cli.common import (
    JsonOption,
    SetOption,
    SpecArg,
    in_bytes,
    in_seconds,
    note,
    number_table,
    out,
    print_json,
    read_spec,
)
from mhmoe_ray.cli.verbs import Verbs
from mhmoe_ray.train import malloc


def train(
    d_model: Annotated[int, typer.Option(min=2, help="d")] = 384,
    layers: Annotated[int, typer.Option(min=2, help="Every second one has experts.")] = 4,
    seq_len: Annotated[int, typer.Option(min=1, help="T")] = 256,
    micro_batches: Annotated[int, typer.Option(min=1, help="M, in a step.")] = 2,
    micro_batch_size: Annotated[int, typer.Option(min=1, help="b, sequences in a micro-batch.")] = 8,
    heads: Annotated[list[int] | None, typer.Option(help="h of a multi-head model; 2 and 3 by default.")] = None,
    precision: Annotated[Literal["float32", "bfloat16"], typer.Option(help="As in `train.precision`.")] = "bfloat16",
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where.")] = "cpu",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, each of a step of every model.")] = 9,
    json: JsonOption = False,
) -> None:
    """Time whole training steps of the follow-up paper's models at a small size: SMoE and, at equal multiply-adds and
    parameters, MH-MoE with k = h.

    A step is training's own: forward, loss and backward of each micro-batch, clipping, AdamW. All models take turns in
    each round; results are medians, beside the first paper's own throughput. With --json the table goes to stderr.
    """
    from mhmoe_ray.bench import timing
    from mhmoe_ray.bench.steps import SMALL, measure
    from mhmoe_ray.bench.timing import checked_sizes

    size = SMALL._replace(
        d_model=d_model,
        layers=layers,
        seq_len=seq_len,
        micro_batches=micro_batches,
        micro_batch_size=micro_batch_size,
        precision=precision,
    )
    where = timing.find(device)
    with checked_sizes("bench train"):
        figures = measure(size, heads or [2, 3], rounds, where)
    tokens = size.micro_batches * size.micro_batch_size * size.seq_len
    title = f"{where}, {precision}; steps of {tokens:,} tokens, medians of {rounds} interleaved rounds"
    tables.show(note if json else out, [(title, tables.steps(figures))])
    if json:
        models = [f.as_json() for f in figures]
        print_json({**where.as_json(), "size": size._asdict(), "rounds": rounds, "models": models})


def run(
    spec: SpecArg,
    set_: SetOption = [],  # noqa: B006 - typer needs the list
    threads: Annotated[int, typer.Option(min=1, help="Of the worker, and of the loop.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Of each, in turn.")] = 3,
    json: JsonOption = False,
) -> None:
    """Time a spec's whole training by one worker, as a run, beside the same steps in a bare loop without Ray.

    The loop is timed with Python's default memory settings, and with the memory settings of a run's workers. All train
    on the spec's prepared data from the same start and end with the same loss, which is checked. With --json the table
    goes to stderr.
    """
    from mhmoe_ray.bench.run import WARM_UP, measure
    from mhmoe_ray.data.shards.manifest import prepared_for

    resolved = read_spec(spec, set_)
    prepared_for(resolved)
    figures = measure(resolved, threads, rounds, lambda line: note.print(line))
    steps = resolved.train.steps - WARM_UP
    tokens = steps * resolved.tokens_per_step
    rows = []
    ways = {"run": figures.run, "loop": figures.loop, "loop, workers' memory": figures.settled}
    for name, results in ways.items():
        seconds = median(result["seconds"] for result in results)
        wait = f"{max(result['data_wait'] for result in results):.2%}" if name == "run" else ""
        rows.append([name, f"{1e3 * seconds / steps:.1f} ms", f"{tokens / seconds:,.0f}", wait])
    table = number_table(["", "a step", "tokens/s", "waits for data"], rows)
    conclusion = (
        f"a run keeps {figures.kept:.3f} of the loop's tokens a second, {figures.kept_of_settled:.3f} of the loop's "
        f"with its workers' memory; all end at loss {figures.run[0]['loss']:.4f}"
    )
    title = f"{threads} threads, {steps:,} steps of {resolved.tokens_per_step:,} tokens; {rounds} rounds in turn"
    tables.show(note if json else out, [(title, table), conclusion])
    if json:
        kept = {"kept": figures.kept, "kept_of_settled": figures.kept_of_settled}
        print_json({"threads": threads, "steps": steps, "tokens": tokens, **figures._asdict(), **kept})


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
    ranks that are simulated by processes on this machine's CPU.

    Bytes are those of rows that dispatch sends from node to node; with --slow-link they are all bytes that crossed the
    link, headers included. Beside their ratio stands the ratio that the drawn routes demand. The link joins two network
    namespaces, which are removed at the end. With --json the table goes to stderr.
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


def checkpoint(
    d_model: Annotated[int, typer.Option(min=2, help="d")] = 384,
    layers: Annotated[int, typer.Option(min=2, help="Every second one has experts.")] = 4,
    folder: Annotated[
        Path | None, typer.Option(help="On the disk to write to; the system's temporary folder by default.")
    ] = None,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where.")] = "cpu",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, each of both ways.")] = 7,
    json: JsonOption = False,
) -> None:
    """Time how long a checkpoint holds up training, beside a synchronous torch.save of the same weights and moments,
    and measure its memory.

    The state is copied during the next step's forward and backward, and training waits for the rest of the copy when
    the update is due; files, hashes and the manifest are written while training goes on. Both ways take turns in each
    round; results are medians from the second checkpoint on. With --json the table goes to stderr.
    """
    from mhmoe_ray.bench import timing
    from mhmoe_ray.bench.checkpoints import measure
    from mhmoe_ray.bench.steps import SMALL, matched_models
    from mhmoe_ray.bench.timing import checked_sizes

    where = timing.find(device)
    with checked_sizes("bench checkpoint"):
        spec = matched_models(SMALL._replace(d_model=d_model, layers=layers), [2])["MH-MoE h 2"]
    with tempfile.TemporaryDirectory(dir=folder, prefix="mhmoe-bench-") as place:
        figures = measure(spec, rounds, Path(place), where)
    title = f"{where}; state of {in_bytes(figures.state)}, medians of {rounds} interleaved rounds"
    tables.show(note if json else out, [(title, tables.checkpoints(figures))])
    if json:
        print_json({**where.as_json(), "rounds": rounds, **figures.as_json()})


def ingest(
    spec: SpecArg,
    set_: SetOption = [],  # noqa: B006 - typer needs the list
    peers: Annotated[bool, typer.Option("--peers", help="Beside datasets and mosaicml-streaming.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Of each, in turn.")] = 3,
    processes: Annotated[int, typer.Option(min=1, help="Of each.")] = 2,
    json: JsonOption = False,
) -> None:
    """Time the preparation of a spec's text, and the stream of its training, each time in new processes.

    The spec must name its tokenizer, because training one is not measured. Text is prepared anew in a temporary folder;
    the stream reads the spec's own prepared data, for all of its train.steps. With --json the table goes to stderr.
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


def commands(
    spec: SpecArg,
    set_: SetOption = [],  # noqa: B006 - typer needs the list
    lines: Annotated[int, typer.Option(min=1, help="Of the long run's metrics.")] = 1_000_000,
    rounds: Annotated[int, typer.Option(min=1, help="Of each.")] = 5,
    submit: Annotated[bool, typer.Option(help="Also submit the spec so often, on the cluster that runs.")] = True,
    json: JsonOption = False,
) -> None:
    """Time `mhmoe --help`, `mhmoe status` of a run with a million lines of metrics, and the time from `mhmoe submit` to
    its job's first sign of life, each as a process of its own.

    Submitted runs are ended at once and stay; start a cluster and prepare the data beforehand.
    """
    from mhmoe_ray.bench.commands import measure
    from mhmoe_ray.data.shards.manifest import prepared_for
    from mhmoe_ray.spec import dump_spec

    resolved = read_spec(spec, set_)
    with tempfile.TemporaryDirectory(prefix="mhmoe-bench-") as folder:
        file = None
        if submit:
            prepared_for(resolved)
            file = Path(folder) / "spec.yaml"
            file.write_text(dump_spec(resolved))
        figures = measure(resolved, file, Path(folder) / "runs", lines, rounds)
    if json:
        print_json({"lines": lines, **figures._asdict()})
        return
    ways = {
        "mhmoe --help": figures.help,
        f"mhmoe status, {lines:,} lines": figures.status,
        "mhmoe submit, to the job's first sign": figures.submit,
    }
    rows = [[name, f"{median(s):.2f} s", f"{max(s):.2f} s"] for name, s in ways.items() if s]
    out.print(number_table(["", "median", "longest"], rows))


app = typer.Typer(cls=Verbs, help="Measure, side by side.", no_args_is_help=True)


@app.callback()
def as_a_worker(context: typer.Context) -> None:
    """Measure, side by side."""
    # Layers and steps are to take the time that they take in a run: settings of memory are read at a process's start.
    memory_kept = ("layer", "train", "checkpoint", "dispatch")
    if context.invoked_subcommand in memory_kept and (settings := malloc.settings(os.environ)):
        os.execve(sys.executable, sys.orig_argv, os.environ | settings)


app.command("layer")(bench_layer.layer)
app.command("train")(train)
app.command("checkpoint")(checkpoint)
app.command("dispatch")(dispatch)
app.command("run")(run)
app.command("ingest")(ingest)
app.command("commands")(commands)
app.command("serve")(bench_serve.serve)
