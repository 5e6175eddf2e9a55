"""`mhmoe bench`: measurements that are compared side by side within one command.

`layer` and `serve` have files of their own. This file has the other commands: `train` times whole training steps of
models of equal work; `run` the overhead of Ray in training; `dispatch` the sending of rows to experts on another node;
`checkpoint` how long saving holds up training; `loss` the output layer with its loss; `ingest` the way from text to
shards and from shards to micro-batches; `commands` how long a user waits for the command line.
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
from mhmoe_ray.cli.formats import format_bytes, format_seconds
from mhmoe_ray.cli.options import JsonOption, SetOption, SpecArg
from mhmoe_ray.cli.output import note, number_table, out, print_json
from mhmoe_ray.cli.verbs import SuggestingGroup
from mhmoe_ray.train import malloc


def train(
    d_model: Annotated[int, typer.Option(min=2, help="d")] = 384,
    layers: Annotated[int, typer.Option(min=2, help="Every second one has experts.")] = 4,
    seq_len: Annotated[int, typer.Option(min=1, help="T")] = 256,
    micro_batches: Annotated[int, typer.Option(min=1, help="M, in a step.")] = 2,
    micro_batch_size: Annotated[int, typer.Option(min=1, help="b, sequences in a micro-batch.")] = 8,
    heads: Annotated[list[int] | None, typer.Option(help="h of a multi-head model; 2 and 3 by default.")] = None,
    precision: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Precision, as in `train.precision`.")
    ] = "bfloat16",
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Device to measure on.")] = "cpu",
    compiled: Annotated[
        bool,
        typer.Option("--compile", help="Also time every model with `train.compile`; each compiles for half a minute."),
    ] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, each of a step of every model.")] = 9,
    json: JsonOption = False,
) -> None:
    """Time whole training steps of a plain mixture of experts (SMoE) and of MH-MoE with equal multiply-adds and
    parameters.

    The models are those of the follow-up paper (arXiv 2411.16205) at a small size, with k = h. Each step does the
    work of a training step: forward, loss and backward of each micro-batch, clipping, AdamW. All models take turns in
    each round; results are medians, beside the throughput in the first paper (arXiv 2404.15045). With --json the table
    goes to stderr.
    """
    from mhmoe_ray.bench import timing
    from mhmoe_ray.bench.steps import SMALL_SIZE, measure
    from mhmoe_ray.bench.timing import checked_sizes

    size = SMALL_SIZE._replace(
        d_model=d_model,
        layers=layers,
        seq_len=seq_len,
        micro_batches=micro_batches,
        micro_batch_size=micro_batch_size,
        precision=precision,
    )
    hardware = timing.find_hardware(device)
    with checked_sizes("bench train"):
        figures = measure(size, heads or [2, 3], rounds, hardware, compiled)
    tokens = size.micro_batches * size.micro_batch_size * size.seq_len
    title = f"{hardware}, {precision}; steps of {tokens:,} tokens, medians of {rounds} interleaved rounds"
    # With --json, stdout must hold only the JSON, so the table goes to stderr.
    tables.print_parts(note if json else out, [(title, tables.steps_table(figures))])
    if json:
        models = [f.as_json() for f in figures]
        print_json({**hardware.as_json(), "size": size._asdict(), "rounds": rounds, "models": models})


def run(
    spec: SpecArg,
    set_: SetOption = [],  # noqa: B006 - typer needs the list
    threads: Annotated[int, typer.Option(min=1, help="Threads of the worker, and of the loop.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each, in turn.")] = 3,
    json: JsonOption = False,
) -> None:
    """Time a spec's whole training by one worker, both as a run and as the same steps in a bare loop without Ray.

    The loop is timed with the default memory settings of the C library, and with those of a run's workers. All train
    on the spec's prepared data from the same initial weights, and the command checks that they end with the same loss.
    With --json the table goes to stderr.
    """
    from mhmoe_ray.api.spec import load_spec
    from mhmoe_ray.bench.run import WARM_UP_STEPS, measure
    from mhmoe_ray.data.shards.recipe import require_prepared_data
    from mhmoe_ray.errors import SpecError

    resolved = load_spec(spec, set_)
    # The preparation of data is not measured, so the data must be prepared already.
    require_prepared_data(resolved)
    if not resolved.model.family.predicts_next_token:
        reason = f"the spec's model is {resolved.model.family.title}, and the bare loop is for decoders"
        raise SpecError("bench run", reason, "name another spec")
    figures = measure(resolved, threads, rounds, lambda line: note.print(line))
    # The measured seconds do not include the warm-up steps, so rates must not count these steps either.
    steps = resolved.train.steps - WARM_UP_STEPS
    tokens = steps * resolved.tokens_per_step
    rows = []
    variants = {"run": figures.run, "loop": figures.loop, "loop, workers' memory": figures.settled}
    for name, results in variants.items():
        seconds = median(result["seconds"] for result in results)
        wait = f"{max(result['data_wait'] for result in results):.2%}" if name == "run" else ""
        rows.append([name, f"{1e3 * seconds / steps:.1f} ms", f"{tokens / seconds:,.0f}", wait])
    table = number_table(["", "a step", "tokens/s", "waits for data"], rows)
    conclusion = (
        f"a run keeps {figures.throughput_ratio:.3f} of the loop's tokens a second, "
        f"{figures.settled_throughput_ratio:.3f} of the loop's with its workers' memory; "
        f"all end at loss {figures.run[0]['loss']:.4f}"
    )
    title = f"{threads} threads, {steps:,} steps of {resolved.tokens_per_step:,} tokens; {rounds} rounds in turn"
    tables.print_parts(note if json else out, [(title, table), conclusion])
    if json:
        ratios = {"kept": figures.throughput_ratio, "kept_of_settled": figures.settled_throughput_ratio}
        print_json({"threads": threads, "steps": steps, "tokens": tokens, **figures._asdict(), **ratios})


def dispatch(
    tokens: Annotated[int, typer.Option(min=1, help="T, tokens of each rank.")] = 512,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each, in turn.")] = 9,
    slow_link: Annotated[
        str | None,
        typer.Option(metavar="RATE", help="Join the nodes by a link of this rate, such as 200mbit (Linux, root)."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Time a forward and backward pass of expert layers through flat and hierarchical dispatch, over two nodes of two
    ranks that are simulated by processes on this machine's CPU.

    Dispatch sends rows (tokens or sub-tokens) to the ranks that hold their experts. The table shows the bytes of rows
    that are sent from node to node; with --slow-link it shows all bytes that crossed the link, headers included. The
    ratio of the bytes of hierarchical to flat dispatch is beside the ratio expected for random choices of experts. The
    link joins two network namespaces, which are removed at the end. With --json the table goes to stderr.
    """
    from mhmoe_ray.bench import timing
    from mhmoe_ray.bench.dispatch.measure import measure

    figures = measure(tokens, rounds, slow_link)
    rows = []
    for f in figures:
        sizes = (f.moe.heads, f.moe.experts, f.moe.top_k, f.width)
        byte_counts = (format_bytes(round(f.flat.bytes)), format_bytes(round(f.hierarchical.bytes)))
        ratios = (f.hierarchical.bytes / f.flat.bytes, f.expected.hierarchical / f.expected.flat)
        times = (format_seconds(f.flat.median), format_seconds(f.hierarchical.median))
        time_ratio = f"{f.hierarchical.median / f.flat.median:.2f}"
        rows.append([f.name, *map(str, sizes), *byte_counts, *(f"{r:.3f}" for r in ratios), *times, time_ratio])
    columns = ["", "h", "E", "k", "D", "flat", "hierarchical", "ratio", "expected", "flat", "hierarchical", "ratio"]
    hardware = timing.find_hardware("cpu")
    link = f"a link of {slow_link}" if slow_link else "one machine"
    title = (
        f"{hardware.name}, 4 ranks of 1 thread, bfloat16, {tokens:,} tokens a rank, over {link}\n"
        f"bytes between the nodes, then time, of a forward and backward pass; medians of {rounds} rounds in turn"
    )
    tables.print_parts(note if json else out, [(title, number_table(columns, rows))])
    if json:
        layers_json = [f.as_json() for f in figures]
        print_json(
            {"machine": hardware.name, "tokens": tokens, "rounds": rounds, "link": slow_link, "layers": layers_json}
        )


def checkpoint(
    d_model: Annotated[int, typer.Option(min=2, help="d")] = 384,
    layers: Annotated[int, typer.Option(min=2, help="Every second one has experts.")] = 4,
    folder: Annotated[
        Path | None, typer.Option(help="Folder on the disk to measure; the system's temporary folder by default.")
    ] = None,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Device to measure on.")] = "cpu",
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
    from mhmoe_ray.bench.steps import SMALL_SIZE, matched_models
    from mhmoe_ray.bench.timing import checked_sizes

    hardware = timing.find_hardware(device)
    with checked_sizes("bench checkpoint"):
        spec = matched_models(SMALL_SIZE._replace(d_model=d_model, layers=layers), [2])["MH-MoE h 2"]
    with tempfile.TemporaryDirectory(dir=folder, prefix="mhmoe-bench-") as bench_folder:
        figures = measure(spec, rounds, Path(bench_folder), hardware)
    title = f"{hardware}; state of {format_bytes(figures.state)}, medians of {rounds} interleaved rounds"
    tables.print_parts(note if json else out, [(title, tables.checkpoints_table(figures))])
    if json:
        print_json({**hardware.as_json(), "rounds": rounds, **figures.as_json()})


def loss(
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a micro-batch.")] = 2048,
    vocab_size: Annotated[int, typer.Option(min=2, help="V")] = 32768,
    d_model: Annotated[int, typer.Option(min=1, help="d")] = 512,
    chunk_rows: Annotated[
        list[int] | None, typer.Option(min=1, help="Tokens in a chunk, as in `train.loss_chunk_rows`; 128 by default.")
    ] = None,
    precision: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Precision, as in `train.precision`.")
    ] = "bfloat16",
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Device to measure on.")] = "cpu",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, each of every way.")] = 7,
    json: JsonOption = False,
) -> None:
    """Time the output layer with its loss, forward and backward, and measure its memory: with all logits at once, and
    chunk by chunk.

    All ways take turns in each round; times are medians. With --json the table goes to stderr.
    """
    from mhmoe_ray.bench import timing
    from mhmoe_ray.bench.loss import Size, measure

    hardware, size = timing.find_hardware(device), Size(tokens, vocab_size, d_model)
    figures = measure(size, chunk_rows or [128], precision, rounds, hardware)
    rows = [
        [
            f.name,
            format_seconds(f.timing.median),
            f"{f.time_ratio:.2f}",
            format_bytes(f.peak_bytes),
            f"{f.memory_ratio:.2f}",
            f"{f.loss:.7f}",
        ]
        for f in figures
    ]
    table = number_table(["", "time", "to all", "peak", "to all", "loss"], rows)
    title = f"{hardware}, {precision}; {tokens:,} tokens, V {vocab_size:,}, d {d_model}; {rounds} interleaved rounds"
    tables.print_parts(note if json else out, [(title, table)])
    if json:
        print_json(
            {**hardware.as_json(), "size": size._asdict(), "rounds": rounds, "ways": [f.as_json() for f in figures]}
        )


def ingest(
    spec: SpecArg,
    set_: SetOption = [],  # noqa: B006 - typer needs the list
    peers: Annotated[bool, typer.Option("--peers", help="Also measure datasets and mosaicml-streaming.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each, in turn.")] = 3,
    processes: Annotated[int, typer.Option(min=1, help="Processes of each.")] = 2,
    json: JsonOption = False,
) -> None:
    """Time the preparation of a spec's text as shards, and the streaming of its training samples, in new processes.

    The spec must name its tokenizer, because training one is not measured. The text is prepared again in a temporary
    folder; the stream reads the spec's own prepared data, for all of its train.steps. For models with images, the
    stream is compared with a bare pool of processes that decode and crop the same images. With --json the table goes to
    stderr.
    """
    from mhmoe_ray.api.spec import load_spec
    from mhmoe_ray.bench.ingest import CONTESTANTS, IMAGE_CONTESTANTS, OUR_CONTESTANTS, run_contest
    from mhmoe_ray.bench.timing import installed_contestants
    from mhmoe_ray.data.family import data_of
    from mhmoe_ray.data.shards.recipe import require_prepared_data
    from mhmoe_ray.errors import SpecError

    resolved = load_spec(spec, set_)
    has_images = data_of(resolved.model).has_rows
    if resolved.data.tokenizer is None and not has_images:
        fix = "prepare it, set data.tokenizer to the tokenizer.json in there and data.prepared to another folder"
        raise SpecError("bench ingest", "the spec has no data.tokenizer", fix)
    # The stream is timed on the spec's own prepared data, so this data must exist.
    require_prepared_data(resolved)
    if has_images:
        names = list(IMAGE_CONTESTANTS)
    elif peers:
        packages = {name: c.package for name, c in CONTESTANTS.items() if name not in IMAGE_CONTESTANTS[1:]}
        names = installed_contestants(packages, note.print)
    else:
        names = list(OUR_CONTESTANTS)
    figures = list(run_contest(resolved, names, rounds, processes, note.print))
    rows = []
    for f in figures:
        seconds, first_round = f.median("seconds"), f.rounds[0]
        # A preparation reports a number of tokens, and a data stream a number of micro-batches, so their rates differ
        # in unit.
        rate = (
            f"{first_round['micro_batches'] / seconds:,.0f} micro-batches/s" if "micro_batches" in first_round else ""
        )
        if "tokens" in first_round:
            rate = f"{first_round['tokens'] / seconds:,.0f} tokens/s"
        peak = format_bytes(round(f.median("peak_bytes"))) if "peak_bytes" in first_round else ""
        rows.append([f.name, f"{seconds:.1f} s", rate, f"{f.ratio_to_ours:.2f}", peak])
    columns = ["", "median", "", "time to ours", "largest process"]
    b, length = resolved.train.micro_batch_size, resolved.data.seq_len
    samples = f"{b} samples" if has_images else f"{b} x {length:,} tokens"
    title = f"{processes} processes each, micro-batches of {samples}; {rounds} rounds in turn"
    tables.print_parts(note if json else out, [(title, number_table(columns, rows))])
    if json:
        figures_json = {f.name: {"rounds": f.rounds, "to_ours": f.ratio_to_ours} for f in figures}
        print_json({"processes": processes, "micro_batch_size": b, "seq_len": length, "figures": figures_json})


def commands(
    spec: SpecArg,
    set_: SetOption = [],  # noqa: B006 - typer needs the list
    lines: Annotated[int, typer.Option(min=1, help="Lines of the long run's metrics.")] = 1_000_000,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each.")] = 5,
    submit: Annotated[bool, typer.Option(help="Also submit the spec that many times, on the running cluster.")] = True,
    json: JsonOption = False,
) -> None:
    """Time `mhmoe --help`, `mhmoe status` of a run with a million lines of metrics, and `mhmoe submit` until its job
    records its first event, each as a process of its own.

    Submitted runs are ended at once, and their directories stay; start a cluster and prepare the data beforehand.
    """
    from mhmoe_ray.api.spec import load_spec
    from mhmoe_ray.bench.commands import measure
    from mhmoe_ray.data.shards.recipe import require_prepared_data
    from mhmoe_ray.spec import dump_spec

    resolved = load_spec(spec, set_)
    with tempfile.TemporaryDirectory(prefix="mhmoe-bench-") as folder:
        spec_file = None
        if submit:
            require_prepared_data(resolved)
            # `mhmoe submit` reads the spec from a file, so the spec is written to one together with the overrides.
            spec_file = Path(folder) / "spec.yaml"
            spec_file.write_text(dump_spec(resolved))
        figures = measure(resolved, spec_file, Path(folder) / "runs", lines, rounds)
    if json:
        print_json({"lines": lines, **figures._asdict()})
        return
    timings = {
        "mhmoe --help": figures.help,
        f"mhmoe status, {lines:,} lines": figures.status,
        "mhmoe submit, to the job's first sign": figures.submit,
    }
    rows = [[name, f"{median(s):.2f} s", f"{max(s):.2f} s"] for name, s in timings.items() if s]
    out.print(number_table(["", "median", "longest"], rows))


app = typer.Typer(cls=SuggestingGroup, help="Measure alternatives side by side.", no_args_is_help=True)


@app.callback()
def use_worker_memory(context: typer.Context) -> None:
    """Restart this process with the memory allocator's settings of training workers if the command needs them."""
    # Layers and training steps should take as long as in a training run, so this process needs the memory allocator's
    # settings of a training worker. The allocator reads its settings only when a process starts, so this process is
    # replaced by one with these settings.
    timed_commands = ("layer", "train", "checkpoint", "loss", "dispatch")
    if context.invoked_subcommand in timed_commands and (settings := malloc.malloc_settings(os.environ)):
        os.execve(sys.executable, sys.orig_argv, os.environ | settings)


app.command("layer")(bench_layer.layer)
app.command("train")(train)
app.command("checkpoint")(checkpoint)
app.command("loss")(loss)
app.command("dispatch")(dispatch)
app.command("run")(run)
app.command("ingest")(ingest)
app.command("commands")(commands)
app.command("serve")(bench_serve.serve)
