"""`mhmoe bench layer`: time and memory of expert layers of equal work."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mhmoe_ray.cli import bench_tables as tables
from mhmoe_ray.cli.common import JsonOption, note, out, print_json

if TYPE_CHECKING:
    from mhmoe_ray.bench.measure import Request
    from mhmoe_ray.bench.sweep import Over
    from mhmoe_ray.bench.timing import Hardware


def layer(
    tokens: Annotated[int, typer.Option(min=1, help="T")] = 4096,
    d_model: Annotated[int, typer.Option(min=2, help="d")] = 512,
    experts: Annotated[int, typer.Option(min=1, help="E of the plain layer.")] = 8,
    top_k: Annotated[int, typer.Option(min=1, help="k")] = 2,
    d_expert: Annotated[int, typer.Option(min=8, help="f of the plain layer.")] = 2048,
    heads: Annotated[list[int] | None, typer.Option(help="h of a multi-head layer; 2 and 4 by default.")] = None,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of weights and tokens.")] = "bfloat16",
    static: Annotated[bool, typer.Option("--static", help="Also static routing, whose masks grow with T^2.")] = False,
    peers: Annotated[bool, typer.Option("--peers", help="Also transformers' and DeepSpeed's layers.")] = False,
    kernels: Annotated[str, typer.Option(help="Each of ours with each of these: grouped,triton,...")] = "auto",
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where.")] = "cpu",
    over: Annotated[
        Literal["tokens", "experts", "top-k", "heads"] | None,
        typer.Option(help="Measure along this: tokens, top-k; experts, heads at equal multiply-adds."),
    ] = None,
    points: Annotated[str | None, typer.Option(help="Where along it: 1024,4096,...", show_default=False)] = None,
    png: Annotated[Path | None, typer.Option(help="With --over: write a plot here.", show_default=False)] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Rounds, each of all layers; 7, or 3 at each point.", show_default=False)
    ] = None,
    json: JsonOption = False,
) -> None:
    """Time forward and backward of expert layers of equal multiply-adds and parameters; measure their memory.

    All layers take turns in each round; results are medians, and ratios to a dense layer of the same multiply-adds.
    With --over, layers are measured at several points along an axis. With --json the tables go to stderr.
    """
    from mhmoe_ray.bench import timing
    from mhmoe_ray.bench.layers import Shape
    from mhmoe_ray.bench.measure import Request
    from mhmoe_ray.bench.timing import checked_sizes

    along = _points(over, points, heads)
    if png:
        _check_png(png, over)
    where = timing.find(device)
    shape = Shape(tokens, d_model, experts, top_k, d_expert)
    named = [kernel.strip() for kernel in kernels.split(",")]
    request = Request(shape, heads or [2, 4], dtype, rounds or (3 if over else 7), named, static, peers)
    head = {**where.as_json(), "dtype": dtype, "rounds": request.rounds, "shape": shape._asdict()}
    with checked_sizes("bench layer"):
        if over:
            _sweep(request, over, along, where, head, png, json)
        else:
            _one_shape(request, where, head, json)


def _one_shape(request: "Request", where: "Hardware", head: dict[str, Any], json: bool) -> None:
    from mhmoe_ray.bench.measure import as_json, measure
    from mhmoe_ray.bench.steps import beside

    figures, absent = measure(request, where, _say)
    shown: list[tables.Part] = [
        (_title(request, where), tables.one_shape(figures, request.shape.top_k, request.shape.d_expert))
    ]
    if request.static:
        shown.append(tables.paper(figures))
        head["paper"] = [b._asdict() for b in beside(figures)]
    _show([*shown, *tables.not_measured(absent)], json)
    if json:
        print_json({**head, "layers": as_json(figures), "not_measured": [a._asdict() for a in absent]})


def _sweep(
    request: "Request",
    over: "Over",
    along: list[int],
    where: "Hardware",
    head: dict[str, Any],
    png: Path | None,
    json: bool,
) -> None:
    from mhmoe_ray.bench.measure import as_json
    from mhmoe_ray.bench.sweep import AXES, sweep

    swept = sweep(request, over, along or AXES[over].points, where, _say)
    _show([_title(request, where), *tables.swept(swept), *tables.not_measured(swept.absent)], json)
    if png:
        from mhmoe_ray.bench.plot import plot

        plot(swept, request, where, png)
        note.print(f"wrote {png}", soft_wrap=True)
    if json:
        at = [{"at": at, "layers": as_json(figures)} for at, figures in swept.points.items()]
        missing = [a._asdict() for a in swept.absent]
        print_json({**head, "over": over, "points": at, "growth": swept.growth, "not_measured": missing})


def _title(request: "Request", where: "Hardware") -> str:
    return f"{where}, {request.dtype}; forward and backward, medians of {request.rounds} interleaved rounds"


def _say(line: str) -> None:
    note.print(line, soft_wrap=True)


def _show(shown: "list[tables.Part]", json: bool) -> None:
    tables.show(note if json else out, shown)


def _points(over: "Over | None", points: str | None, heads: list[int] | None) -> list[int]:
    if points is not None and over is None:
        raise typer.BadParameter("--points: there is no axis for them; give --over, for example --over tokens")
    if heads and over == "heads":
        raise typer.BadParameter("--heads: --over heads chooses them itself, so they would be ignored; give --points")
    try:
        found = [int(point) for point in points.split(",")] if points else []
    except ValueError:
        raise typer.BadParameter(f"--points {points}: they are not whole numbers; write them as 1024,4096") from None
    if any(point < 1 for point in found):
        raise typer.BadParameter(f"--points {points}: a point must be at least 1; leave the others out")
    return found


def _check_png(png: Path, over: "Over | None") -> None:
    """Check that the plot has an axis and can be written, before minutes of measuring.

    Raises:
        BadParameter: there is no axis.
        DataError: matplotlib is not installed, or the file could not be written.
    """
    from mhmoe_ray import pictures

    if over is None:
        raise typer.BadParameter(f"--png {png}: a plot needs an axis; give --over, for example --over tokens")
    pictures.check(png)
