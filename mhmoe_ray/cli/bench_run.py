"""`mhmoe bench run`: what a run costs beside its training steps."""

from statistics import median
from typing import Annotated

import typer

from mhmoe_ray.cli import bench_tables as tables
from mhmoe_ray.cli.common import JsonOption, SetOption, SpecArg, note, number_table, out, print_json, read_spec


def run(
    spec: SpecArg,
    set_: SetOption = [],  # noqa: B006 - typer needs the list
    threads: Annotated[int, typer.Option(min=1, help="Of the worker, and of the loop.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Of each, in turn.")] = 3,
    json: JsonOption = False,
) -> None:
    """Time a spec's whole training by one worker, as a run, beside the same steps in a bare loop without Ray.

    The loop is timed as Python starts it, and with the settings of memory that a run's workers get. All train on the
    spec's prepared data from the same start and end with the same loss, which is checked. With --json the table goes to
    stderr.
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
