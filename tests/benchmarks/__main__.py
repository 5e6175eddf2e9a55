"""Command line of the project's own benchmarks. With --json, the table goes to stderr.

python -m tests.benchmarks adapter|checkpoint|commands|fairness|ingest|store|dispatch [options]
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import typer

from mhmoe_ray.cli.options import JsonOption, SetOption, SpecArg
from mhmoe_ray.cli.output import print_note
from mhmoe_ray.errors import MhmoeError
from mhmoe_ray.train import malloc

app = typer.Typer(help="Measure what only this project measures.", no_args_is_help=True)


@app.callback()
def use_worker_memory(context: typer.Context) -> None:
    """Restart this process with the memory allocator's settings of training workers if the benchmark needs them."""
    # The allocator reads its settings only when a process starts, so this process is replaced by one with these
    # settings. `mhmoe bench` does the same.
    timed_benchmarks = ("adapter", "checkpoint", "dispatch")
    if context.invoked_subcommand in timed_benchmarks and (settings := malloc.malloc_settings(os.environ)):
        os.execve(sys.executable, sys.orig_argv, os.environ | settings)


@app.command()
def adapter(
    seq_len: Annotated[int, typer.Option(min=2, help="T")] = 255,
    batch_size: Annotated[int, typer.Option(min=1, help="b")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, each of both.")] = 15,
    json: JsonOption = False,
) -> None:
    """Time training steps of adapters of a small Mixtral, beside those of TRL's trainer with PEFT (`pip install trl
    peft`)."""
    from mhmoe_ray.bench.timing import find_hardware
    from tests.benchmarks.adapter import measure

    with tempfile.TemporaryDirectory(prefix="mhmoe-bench-") as folder:
        measure(seq_len, batch_size, rounds, Path(folder), find_hardware("cpu")).print(json)


@app.command()
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
    the update is due; files, hashes and the manifest are written while training goes on.
    """
    from mhmoe_ray.bench.steps import SMALL_SIZE, matched_models
    from mhmoe_ray.bench.timing import checked_sizes, find_hardware
    from tests.benchmarks.checkpoint import measure

    hardware = find_hardware(device)
    with checked_sizes("checkpoint"):
        spec = matched_models(SMALL_SIZE._replace(d_model=d_model, layers=layers), [2])["MH-MoE h 2"]
    with tempfile.TemporaryDirectory(dir=folder, prefix="mhmoe-bench-") as bench_folder:
        measure(spec, rounds, Path(bench_folder), hardware).print(json)


@app.command()
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
    from mhmoe_ray.data.shards.recipe import require_prepared_data
    from mhmoe_ray.spec import dump_spec
    from tests.benchmarks.commands import measure

    resolved = load_spec(spec, set_)
    with tempfile.TemporaryDirectory(prefix="mhmoe-bench-") as folder:
        spec_file = None
        if submit:
            require_prepared_data(resolved)
            # `mhmoe submit` reads the spec from a file, so the spec is written to one together with the overrides.
            spec_file = Path(folder) / "spec.yaml"
            spec_file.write_text(dump_spec(resolved))
        measure(resolved, spec_file, Path(folder) / "runs", lines, rounds).print(json)


@app.command()
def fairness(
    engine: Annotated[str, typer.Option(help="Engine, torch or vllm.")] = "torch",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, each with and without the other client.")] = 3,
    json: JsonOption = False,
) -> None:
    """Time five short requests of a client, alone and while another client has 50 long ones in the same engine."""
    from tests.benchmarks.fairness import measure

    with tempfile.TemporaryDirectory(prefix="mhmoe-bench-") as folder:
        measure(engine, rounds, Path(folder)).print(json)


@app.command()
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
    stream is compared with a bare pool of processes that decode and crop the same images.
    """
    from mhmoe_ray.api.spec import load_spec
    from tests.benchmarks.ingest import measure

    measure(load_spec(spec, set_), peers, rounds, processes, print_note).print(json)


@app.command()
def store(
    spec: SpecArg,
    set_: SetOption = [],  # noqa: B006 - typer needs the list
    kind: Annotated[Literal["stream", "run"] | None, typer.Option(help="What is measured; both by default.")] = None,
    latency: Annotated[float, typer.Option(min=0, help="Latency of the store in ms.")] = 50,
    rate: Annotated[float, typer.Option(min=0.001, help="Rate of the store in MB/s.")] = 100,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each, in turn.")] = 3,
    processes: Annotated[int, typer.Option(min=1, help="Processes of each.")] = 2,
    json: JsonOption = False,
) -> None:
    """Time the stream and a whole run of a spec from its prepared data on the local disk, and from a copy of the data
    on an object store with latency, with a cache for all shards and for a tenth of them.

    A run has one worker. The table counts the requests that read objects, and their bytes.
    """
    from mhmoe_ray.api.spec import load_spec
    from tests.benchmarks.store import MEASUREMENTS, measure
    from tests.benchmarks.store_server import Link

    link, kinds = Link(latency / 1e3, rate * 1e6), [kind] if kind else list(MEASUREMENTS)
    measure(load_spec(spec, set_), kinds, rounds, processes, link, print_note).print(json)


@app.command()
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
    link joins two network namespaces, which are removed at the end.
    """
    from tests.benchmarks.dispatch.measure import measure

    measure(tokens, rounds, slow_link).print(json)


if __name__ == "__main__":
    try:
        app()
    except MhmoeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
