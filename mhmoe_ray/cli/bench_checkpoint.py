"""`mhmoe bench checkpoint`: how long saving holds training up."""

import tempfile
from pathlib import Path
from typing import Annotated, Literal

import typer

from mhmoe_ray.cli import bench_tables as tables
from mhmoe_ray.cli.common import JsonOption, in_bytes, note, out, print_json


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
    """Time how long a checkpoint holds training up, beside a synchronous torch.save of the same weights and moments,
    and what memory it takes.

    The state is copied beside the next step's forward and backward, and training waits for what of it is left when the
    update is due; files, hashes and the manifest are written while it goes on. Both ways take turns in each round;
    medians from the second checkpoint on. With --json the table goes to stderr.
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
