"""`mhmoe bench train`: what a whole training step of models of equal work costs."""

from typing import Annotated, Literal

import typer

from mhmoe_ray.cli import bench_tables as tables
from mhmoe_ray.cli.common import JsonOption, note, out, print_json


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
    each round; medians, beside the first paper's own throughput. With --json the table goes to stderr.
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
