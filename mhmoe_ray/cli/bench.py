"""`mhmoe bench`: measurements, side by side in one run."""

import os
import sys

import typer

from mhmoe_ray.cli import (
    bench_checkpoint,
    bench_commands,
    bench_dispatch,
    bench_ingest,
    bench_layer,
    bench_run,
    bench_serve,
    bench_train,
)
from mhmoe_ray.train import driver

app = typer.Typer(help="Measure, side by side.", no_args_is_help=True)


@app.callback()
def as_a_worker(context: typer.Context) -> None:
    """Measure, side by side."""
    # Layers and steps are to take the time that they take in a run: settings of memory are read at a process's start.
    memory_kept = ("layer", "train", "checkpoint", "dispatch")
    if context.invoked_subcommand in memory_kept and (settings := driver.settings(os.environ)):
        os.execve(sys.executable, sys.orig_argv, os.environ | settings)


app.command("layer")(bench_layer.layer)
app.command("train")(bench_train.train)
app.command("checkpoint")(bench_checkpoint.checkpoint)
app.command("dispatch")(bench_dispatch.dispatch)
app.command("run")(bench_run.run)
app.command("ingest")(bench_ingest.ingest)
app.command("commands")(bench_commands.commands)
app.command("serve")(bench_serve.serve)
