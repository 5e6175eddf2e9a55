"""`mhmoe bench`: measurements, side by side in one run."""

import typer

from mhmoe_ray.cli import bench_ingest, bench_layer, bench_run, bench_train

app = typer.Typer(help="Measure, side by side.", no_args_is_help=True)


app.command("layer")(bench_layer.layer)
app.command("train")(bench_train.train)
app.command("run")(bench_run.run)
app.command("ingest")(bench_ingest.ingest)
