"""`mhmoe bench layer`: time and memory of expert layers that do equal work."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mhmoe_ray.cli import bench_tables as tables
from mhmoe_ray.cli.options import JsonOption
from mhmoe_ray.cli.output import print_note

if TYPE_CHECKING:
    from mhmoe_ray.bench.sweep import AxisName


def layer(
    tokens: Annotated[int, typer.Option(min=1, help="T")] = 4096,
    d_model: Annotated[int, typer.Option(min=2, help="d")] = 512,
    experts: Annotated[int, typer.Option(min=1, help="E of the plain layer.")] = 8,
    top_k: Annotated[int, typer.Option(min=1, help="k")] = 2,
    d_expert: Annotated[int, typer.Option(min=8, help="f of the plain layer.")] = 2048,
    heads: Annotated[list[int] | None, typer.Option(help="h of a multi-head layer; 2 and 4 by default.")] = None,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Type of weights and tokens.")] = "bfloat16",
    static: Annotated[
        bool, typer.Option("--static", help="Also measure static routing, whose masks grow with T^2.")
    ] = False,
    peers: Annotated[bool, typer.Option("--peers", help="Also measure transformers' and DeepSpeed's layers.")] = False,
    kernels: Annotated[
        str, typer.Option(help="Backends, by each of which our layers are measured: grouped,triton,...")
    ] = "auto",
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Device to measure on.")] = "cpu",
    axis: Annotated[
        Literal["tokens", "experts", "top-k", "heads"] | None,
        typer.Option("--over", help="Axis to measure along: tokens, top-k; experts, heads at equal multiply-adds."),
    ] = None,
    points: Annotated[str | None, typer.Option(help="Points on the axis: 1024,4096,...", show_default=False)] = None,
    png: Annotated[Path | None, typer.Option(help="With --over: write a plot here.", show_default=False)] = None,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, help="Rounds, each of all layers; 7, or 3 at each point of an axis.", show_default=False),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Time forward and backward of expert layers of equal multiply-adds and parameters; measure their memory.

    All layers take turns in each round; results are medians, and ratios to a dense layer of the same multiply-adds.
    With --over, layers are measured at several points along an axis. With --json the tables go to stderr.
    """
    from mhmoe_ray.bench.layers import LayerShape
    from mhmoe_ray.bench.measure import LayerRequest, as_json, measure
    from mhmoe_ray.bench.steps import compare_with_paper
    from mhmoe_ray.bench.sweep import AXES, sweep
    from mhmoe_ray.bench.timing import checked_sizes, find_hardware

    # The options are checked first, because a mistake should show at once and not after minutes of measuring.
    axis_points = _parse_points(axis, points, heads)
    if png:
        _check_png(png, axis)
    hardware = find_hardware(device)
    shape = LayerShape(tokens, d_model, experts, top_k, d_expert)
    kernel_names = [kernel.strip() for kernel in kernels.split(",")]
    # A sweep measures many points, so each of them gets fewer rounds than a single point without a sweep.
    request = LayerRequest(shape, heads or [2, 4], dtype, rounds or (3 if axis else 7), kernel_names, static, peers)
    header = {**hardware.as_json(), "dtype": dtype, "rounds": request.rounds, "shape": shape._asdict()}
    title = f"{hardware}, {request.dtype}; forward and backward, medians of {request.rounds} interleaved rounds"
    with checked_sizes("bench layer"):
        if axis is None:
            figures, skipped = measure(request, hardware, print_note)
            parts: list[tables.Part] = [(title, tables.shape_table(figures, shape))]
            if static:
                comparisons = compare_with_paper(figures)
                parts.append(tables.paper_table(comparisons))
                header["paper"] = [comparison._asdict() for comparison in comparisons]
            data = {**header, "layers": as_json(figures)}
        else:
            sweep_result = sweep(request, axis, axis_points or AXES[axis].points, hardware, print_note)
            skipped = sweep_result.skipped
            parts = [title, *tables.sweep_tables(sweep_result)]
            points_json = [{"at": point, "layers": as_json(figures)} for point, figures in sweep_result.points.items()]
            data = {**header, "over": axis, "points": points_json, "growth": sweep_result.growth}
    if skipped:
        parts.append("\n".join(f"not measured: {case.name}: {case.reason}" for case in skipped))
    tables.print_results(parts, json, {**data, "not_measured": [case.as_json() for case in skipped]})
    # Only a plot needs matplotlib, which is optional, so the module that needs it is imported only for a plot.
    if png:
        from mhmoe_ray.bench.plot import plot

        plot(sweep_result, request, hardware, png)
        print_note(f"wrote {png}")


def _parse_points(axis: "AxisName | None", points: str | None, heads: list[int] | None) -> list[int]:
    """Return the numbers in the option --points, such as 1024,4096, which are at least 1; empty without the option."""
    if points is not None and axis is None:
        raise typer.BadParameter("--points: there is no axis for them; give --over, for example --over tokens")
    if heads and axis == "heads":
        raise typer.BadParameter("--heads: --over heads chooses them itself, so they would be ignored; give --points")
    try:
        numbers = [int(point) for point in points.split(",")] if points else []
    except ValueError:
        raise typer.BadParameter(f"--points {points}: they are not whole numbers; write them as 1024,4096") from None
    # The points of each axis are counts (tokens, experts, experts per token or heads), so the smallest is 1.
    if any(point < 1 for point in numbers):
        raise typer.BadParameter(f"--points {points}: a point must be at least 1; leave the others out")
    return numbers


def _check_png(png: Path, axis: "AxisName | None") -> None:
    """Check that the plot can be drawn and written, because an error after minutes of measuring would come too late."""
    from mhmoe_ray import plotting

    if axis is None:
        raise typer.BadParameter(f"--png {png}: a plot needs an axis; give --over, for example --over tokens")
    plotting.check(png)
