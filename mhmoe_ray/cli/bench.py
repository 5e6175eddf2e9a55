"""`mhmoe bench`: measurements that are compared side by side within one command.

`layer` and `serve` have files of their own. This file has the other commands: `train` times whole training steps of
models of equal work; `plan` steps beside the planner's estimates; `run` the overhead of Ray in training; `count` counts
the work of a step as on a GPU.
"""

import os
import sys
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import typer

from mhmoe_ray.cli import bench_layer, bench_serve
from mhmoe_ray.cli import bench_tables as tables
from mhmoe_ray.cli.formats import format_seconds
from mhmoe_ray.cli.options import JsonOption, SetOption, SpecArg
from mhmoe_ray.cli.output import number_table, print_note
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
    from mhmoe_ray.bench.steps import SMALL_SIZE, measure
    from mhmoe_ray.bench.timing import checked_sizes, find_hardware

    size = SMALL_SIZE._replace(
        d_model=d_model,
        layers=layers,
        seq_len=seq_len,
        micro_batches=micro_batches,
        micro_batch_size=micro_batch_size,
        precision=precision,
    )
    hardware = find_hardware(device)
    with checked_sizes("bench train"):
        figures = measure(size, heads or [2, 3], rounds, hardware, compiled)
    tokens = size.micro_batches * size.micro_batch_size * size.seq_len
    title = f"{hardware}, {precision}; steps of {tokens:,} tokens, medians of {rounds} interleaved rounds"
    models = [f.as_json() for f in figures]
    data = {**hardware.as_json(), "size": size._asdict(), "rounds": rounds, "models": models}
    tables.print_results([(title, tables.steps_table(figures))], json, data)


def plan(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, each of a few steps of every setting.")] = 5,
    json: JsonOption = False,
) -> None:
    """Time training steps of four models in up to ten settings at one and two ranks, beside the planner's estimates.

    The estimates come from ceilings of this CPU that are measured in the same rounds: matrix products, copies, and
    exchanges between two ranks of one thread. The share of the peak that products reach and the time of a small
    operation are fitted on two further models. The last line has the rank correlation of estimates and medians. A round
    takes two to three minutes on two cores. With --json the table goes to stderr.
    """
    from mhmoe_ray.bench.plan import CALIBRATION_MODELS, CALIBRATION_SETTINGS, MODELS, SETTINGS, build_specs, measure
    from mhmoe_ray.bench.timing import cpu_name

    calibration_specs = build_specs(CALIBRATION_MODELS, CALIBRATION_SETTINGS)
    figures = measure(build_specs(MODELS, SETTINGS), calibration_specs, rounds, print_note)
    rows = []
    for case, estimated_seconds in figures.estimated.items():
        seconds = median(figures.measured[case])
        times = (format_seconds(estimated_seconds), format_seconds(seconds), f"{estimated_seconds / seconds:.2f}")
        rows.append((*case, *times))
    settings = [
        {"model": case[0], "setting": case[1], "estimated": figures.estimated.get(case), "seconds": seconds}
        for case, seconds in figures.measured.items()
    ]
    table = number_table(["model", "setting", "estimated", "measured", "ratio"], rows, names=["model", "setting"])
    title = f"{cpu_name()}, ranks of 1 thread; medians of {rounds} interleaved rounds"
    correlations = {model: figures.rank_correlation(model) for model in MODELS}
    by_model = ", ".join(f"{model} {value:.2f}" for model, value in correlations.items())
    conclusion = (
        f"rank correlation of all {len(rows)} settings: {figures.rank_correlation():.3f}; of those of {by_model}"
    )
    calibrations = {world: calibration._asdict() for world, calibration in figures.calibrations.items()}
    data = {"machine": cpu_name(), "rounds": rounds, "calibrations": calibrations, "settings": settings}
    data |= {"rank_correlation": figures.rank_correlation(), "rank_correlations": correlations}
    tables.print_results([(title, table), conclusion], json, data)


def run(
    spec: SpecArg,
    set_: SetOption = [],  # noqa: B006 - typer needs the list
    threads: Annotated[int, typer.Option(min=1, help="Threads of the worker, and of the loops.")] = 2,
    peers: Annotated[bool, typer.Option("--peers", help="Also train transformers' model in a plain loop.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each, in turn.")] = 3,
    json: JsonOption = False,
) -> None:
    """Time a spec's whole training by one worker, both as a run and as the same steps in a bare loop without Ray.

    The loop is timed with the default memory settings of the C library, and with those of a run's workers. All train
    on the spec's prepared data from the same initial weights, and the command checks that they end with the same loss.
    A peer has these weights, samples and optimizer settings too; experts of transformers run in a loop (eager) and as
    grouped_mm. Ratios are medians, with the lowest and highest of a round. With --json the table goes to stderr.
    """
    from mhmoe_ray.api.spec import load_spec
    from mhmoe_ray.bench.loops import WARM_UP_STEPS
    from mhmoe_ray.bench.run import LOOP, RUN, SETTLED, measure
    from mhmoe_ray.data.shards.recipe import require_prepared_data
    from mhmoe_ray.errors import SpecError

    resolved = load_spec(spec, set_)
    # The preparation of data is not measured, so the data must be prepared already.
    require_prepared_data(resolved)
    if not resolved.model.family.predicts_next_token:
        reason = f"the spec's model is {resolved.model.family.title}, and the bare loop is for decoders"
        raise SpecError("bench run", reason, "name another spec")
    figures = measure(resolved, threads, rounds, print_note, peers)
    # The measured seconds do not include the warm-up steps, so rates must not count these steps either.
    steps = resolved.train.steps - WARM_UP_STEPS
    tokens = steps * resolved.tokens_per_step
    rows, median_ratios = [], {}
    for name, results in figures.results.items():
        seconds, ratios = figures.median_seconds(name), figures.throughput_ratios(name)
        median_ratios[name] = median(ratios)
        comparison = f"{median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        wait = f"{max(result['data_wait'] for result in results):.2%}" if name == RUN else ""
        title = "loop, workers' memory" if name == SETTLED else name
        speed = (f"{1e3 * seconds / steps:.1f} ms", f"{tokens / seconds:,.0f}", "" if name == RUN else comparison)
        rows.append([title, *speed, wait, f"{results[0]['loss']:.4f}"])
    table = number_table(["", "a step", "tokens/s", "the run's to it", "waits for data", "last loss"], rows)
    peer = figures.fastest_peer
    conclusion = (
        f"a run keeps {median_ratios[LOOP]:.3f} of the loop's tokens a second, "
        f"{median_ratios[SETTLED]:.3f} of the loop's with its workers' memory"
    )
    if peer:
        conclusion += f", {median_ratios[peer]:.3f} of {peer}"
    title = f"{threads} threads, {steps:,} steps of {resolved.tokens_per_step:,} tokens; {rounds} rounds in turn"
    data: dict[str, Any] = {"threads": threads, "steps": steps, "tokens": tokens, **figures.results}
    data |= {"kept": median_ratios[LOOP], "kept_of_settled": median_ratios[SETTLED]}
    if peer:
        data |= {"fastest_peer": peer, "kept_of_peer": median_ratios[peer]}
    tables.print_results([(title, table), conclusion], json, data)


def count(
    spec: Annotated[Path | None, typer.Argument(help="A spec; by default the --preset.", show_default=False)] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="A preset of size base, in a step of 16 sequences.", show_default="mhmoe without a spec"),
    ] = None,
    set_: SetOption = [],  # noqa: B006 - typer needs the list
    json: JsonOption = False,
) -> None:
    """Count the kernels, bytes and FLOPs of a rank's training step as on an H100, without a GPU.

    The trainer runs a step with tensors that have no values. Times are those of the counted work one after another at
    an H100's rates (bench/acceptance/goals.py), so a GPU is likely to take longer; none was compared with a GPU. Fused
    kernels of compiled blocks are those that torch's compiler makes for an H100. Exchanges between ranks are not
    counted. With --json the table goes to stderr.
    """
    from mhmoe_ray.api.spec import load_spec
    from mhmoe_ray.bench.acceptance.step_work import count_step
    from mhmoe_ray.planner.presets import FAMILIES

    if spec and preset:
        raise typer.BadParameter("--preset: a spec is given; leave one of the two out")
    preset = preset or "mhmoe"
    tree: dict[str, Any] = {"name": "count", "preset": preset, "train": {"micro_batches": 1, "micro_batch_size": 16}}
    tree |= {"data": {"sources": {"none": {"path": "none"}}, "prepared": "none"}}
    tree |= {"size": "base"} if preset in FAMILIES else {}
    resolved = load_spec(spec or tree, [*set_, "cluster.gpus_per_worker=1"])
    parts = count_step(resolved)
    rows = tables.work_rows(parts)
    table = number_table(["part", "kernels", "GB", "GFLOP", "ms"], rows, names=["part"])
    tokens = f"{resolved.tokens_per_step // resolved.cluster.max_world_size:,} tokens"
    title = f"a rank's step of {resolved.origin or resolved.name}, {tokens}, counted for an H100"
    data = {"parts": {name: {**vars(work), "seconds": work.seconds} for name, work in parts.items()}}
    tables.print_results([(title, table)], json, data)


app = typer.Typer(cls=SuggestingGroup, help="Measure alternatives side by side.", no_args_is_help=True)


@app.callback()
def use_worker_memory(context: typer.Context) -> None:
    """Restart this process with the memory allocator's settings of training workers if the command needs them."""
    # Layers and training steps should take as long as in a training run, so this process needs the memory allocator's
    # settings of a training worker. The allocator reads its settings only when a process starts, so this process is
    # replaced by one with these settings.
    timed_commands = ("layer", "train", "plan")
    if context.invoked_subcommand in timed_commands and (settings := malloc.malloc_settings(os.environ)):
        os.execve(sys.executable, sys.orig_argv, os.environ | settings)


app.command("layer")(bench_layer.layer)
app.command("train")(train)
app.command("plan")(plan)
app.command("run")(run)
app.command("count")(count)
app.command("serve")(bench_serve.serve)
