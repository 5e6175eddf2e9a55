"""`mhmoe cluster`: the Ray cluster on this machine that we start where none is named."""

from dataclasses import asdict
from typing import Annotated

import typer

from mhmoe_ray.cli.common import JsonOption, facts, out, print_json
from mhmoe_ray.cli.launch import LOCAL_CPUS

app = typer.Typer(help="Start, see and stop a Ray cluster on this machine.", no_args_is_help=True)


@app.command()
def up(
    cpus: Annotated[int, typer.Option(min=1, help="Logical CPUs; may be more than there are cores.")] = LOCAL_CPUS,
) -> None:
    """Start it, unless it runs. It is open to you alone: it has a token and listens on loopback."""
    from mhmoe_ray.cluster.local import start_local

    cluster = start_local(cpus)
    out.print(f"running: {cluster.address}, {cluster.cpus} CPUs", soft_wrap=True)


@app.command()
def status(json: JsonOption = False) -> None:
    """Show it."""
    from mhmoe_ray.cluster.local import find_local

    cluster = find_local()
    if json:
        print_json(asdict(cluster) if cluster else None)
    elif cluster is None:
        out.print("no local cluster runs")
    else:
        out.print(facts({"dashboard": cluster.address, "cpus": str(cluster.cpus), "folder": str(cluster.folder)}))


@app.command()
def down() -> None:
    """Stop it, with all jobs and applications on it."""
    from mhmoe_ray.cluster.local import stop_local

    out.print("stopped" if stop_local() else "no local cluster ran")
