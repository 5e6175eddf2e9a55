"""The `mhmoe` application: registers the commands and handles their errors.

An error of a class in errors.py becomes one line on stderr and an exit code. Any other error is a bug and keeps its
traceback.
"""

import os
import sys
from typing import Annotated

import typer

from mhmoe_ray import __version__
from mhmoe_ray.cli import (
    bench,
    chat,
    ckpt,
    cluster,
    data,
    eval,
    generate,
    init,
    logs,
    plan,
    presets,
    report,
    routing,
    runs,
    schema,
    serve,
    status,
    submit,
    sweep,
)
from mhmoe_ray.cli.output import activity_lines
from mhmoe_ray.cli.verbs import SuggestingGroup
from mhmoe_ray.errors import MhmoeError, StorageError

app = typer.Typer(
    cls=SuggestingGroup,
    help="Train, inspect and serve Multi-Head Mixture-of-Experts language models on Ray.",
    no_args_is_help=True,
    # A bug shows Python's own traceback, and help texts are printed as written; typer would format both with rich.
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(is_requested: bool) -> None:
    if is_requested:
        print(f"mhmoe {__version__}")
        raise typer.Exit


@app.callback()
def _apply_global_options(
    context: typer.Context,
    # The option is eager so that `mhmoe --version` works: without it, the missing command would be reported first.
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    context.call_on_close(activity_lines.end)
    # `main` handles errors but does not see this option, so the option is passed on in an environment variable.
    if debug:
        os.environ["MHMOE_DEBUG"] = "1"


app.command("init")(init.init)
app.command("plan")(plan.plan)
app.command("presets")(presets.presets)
app.command("schema")(schema.schema)
app.command("submit")(submit.submit)
app.command("status")(status.status)
app.command("list")(runs.list_)
app.command("logs")(logs.logs)
app.command("stop")(runs.stop)
app.command("profile")(runs.profile)
app.command("resume")(runs.resume)
app.command("eval")(eval.eval_)
app.command("routing")(routing.routing)
app.command("report")(report.report)
app.command("track")(runs.track)
app.command("sweep")(sweep.sweep)
app.command("doctor")(cluster.doctor)
app.command("rm")(runs.rm)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.add_typer(data.app, name="data")
app.add_typer(serve.app, name="serve")
app.add_typer(ckpt.app, name="ckpt")
app.add_typer(bench.app, name="bench")
app.add_typer(cluster.app, name="cluster")


def main() -> None:
    """Run the command of the process's arguments; print an error as one line and end with the error's exit code."""
    try:
        try:
            app()
        except FileNotFoundError as e:
            if "No usable temporary directory" not in str(e):  # This is the message of `tempfile`.
                raise
            raise StorageError("temporary files", str(e.strerror), "set TMPDIR to a folder that you can write") from e
    except MhmoeError as e:
        if os.environ.get("MHMOE_DEBUG"):
            raise
        print(f"error: {e}", file=sys.stderr)
        sys.exit(e.exit_code)


if __name__ == "__main__":
    main()
