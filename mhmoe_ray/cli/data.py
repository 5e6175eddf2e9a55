"""`mhmoe data`: sample text, looking at raw text, preparing it for training, and the mixture that training reads."""

import typer

from mhmoe_ray.cli import inspect, lint, mix, prepare, sample

app = typer.Typer(help="Make, inspect and prepare training text.", no_args_is_help=True)
app.command("sample")(sample.sample)
app.command("inspect")(inspect.inspect)
app.command("lint")(lint.lint)
app.command("prepare")(prepare.prepare)
app.command("mix")(mix.mix)
