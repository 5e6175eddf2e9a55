"""`mhmoe bench`: measurements, side by side in one run."""

import typer

from mhmoe_ray.cli import bench_layer

app = typer.Typer(help="Measure, side by side.", no_args_is_help=True)


@app.callback()
def _root() -> None:
    """Keeps `layer` a verb of its own while it is the only one."""


app.command("layer")(bench_layer.layer)
