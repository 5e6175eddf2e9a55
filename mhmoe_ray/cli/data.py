"""`mhmoe data`: sample text, looking at raw text, preparing it for training, and the mixture that training reads."""

from pathlib import Path
from typing import Annotated

import typer

from mhmoe_ray.cli import inspect, lint, mix, prepare
from mhmoe_ray.cli.common import JsonOption, out, print_json

app = typer.Typer(help="Make, inspect and prepare training text.", no_args_is_help=True)
app.command("inspect")(inspect.inspect)
app.command("lint")(lint.lint)
app.command("prepare")(prepare.prepare)
app.command("mix")(mix.mix)


@app.command()
def sample(folder: Annotated[Path, typer.Argument(help="Where to write it.")], json: JsonOption = False) -> None:
    """Write real text in RedPajama's layout, and one folder per language, from installed packages."""
    from mhmoe_ray.data.corpus.small import write_sample

    written = write_sample(folder)
    if json:
        print_json(written)
        return
    out.print(f"{sum(written.values())} documents in {len(written)} domains and languages below {folder}")
