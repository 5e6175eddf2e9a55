"""`mhmoe cluster`: the local Ray cluster and names for others; `mhmoe doctor`: what works here, and why the rest does
not."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from mhmoe_ray.cli.common import (
    STORAGE,
    AddressOption,
    JsonOption,
    SetOption,
    StorageOption,
    facts,
    note,
    out,
    print_json,
    read_spec,
)
from mhmoe_ray.cli.jobs import LOCAL_CPUS
from mhmoe_ray.cli.verbs import Verbs

if TYPE_CHECKING:
    from mhmoe_ray.cluster.doctor import Finding


STYLES = {"ok": "green", "note": "dim", "warning": "yellow", "error": "bold red"}


def doctor(address: AddressOption = None, storage: StorageOption = STORAGE, json: JsonOption = False) -> None:
    """Check this machine, the cluster that commands would use, and storage, and say what to do.

    The exit code is 11 if a check finds an error; notes and warnings do not change it.
    """
    from mhmoe_ray.cluster.doctor import examine
    from mhmoe_ray.errors import DOCTOR_EXIT_CODE

    found = []
    for finding in examine(address, storage):
        found.append(finding)
        if not json:
            _show(finding)
    if json:
        print_json([f._asdict() for f in found])
    if any(f.level == "error" for f in found):
        raise typer.Exit(DOCTOR_EXIT_CODE)


def _show(finding: "Finding") -> None:
    level = Text(f"{finding.level:<8}", style=STYLES[finding.level])
    out.print(level, Text(f"{finding.what}: {finding.found}"), soft_wrap=True)
    if finding.level in ("warning", "error"):
        out.print(Text(f"{'':<9}{finding.fix}", style="dim"), soft_wrap=True)


app = typer.Typer(
    cls=Verbs, help="Ray clusters: one on this machine to start and stop, others to choose.", no_args_is_help=True
)

NameArg = Annotated[str, typer.Argument(metavar="NAME", help="Of a cluster; `local` is the one on this machine.")]


@app.command()
def up(
    cpus: Annotated[int, typer.Option(min=1, help="Logical CPUs; may be more than there are cores.")] = LOCAL_CPUS,
) -> None:
    """Start the local cluster, unless it runs. It is open to you alone: it has a token and listens on loopback."""
    from mhmoe_ray.cluster.local import start_local

    cluster = start_local(cpus)
    out.print(f"running: {cluster.address}, {cluster.cpus} CPUs", soft_wrap=True)


@app.command()
def status(address: AddressOption = None, json: JsonOption = False) -> None:
    """Show the cluster that commands use: its nodes, and what is free on them."""
    from mhmoe_ray.cluster.connect import connect_if_there
    from mhmoe_ray.cluster.nodes import free_nodes

    connection = connect_if_there(address)
    if connection is None:
        print_json(None) if json else out.print("no local cluster runs")
        return
    nodes = free_nodes(connection, None)
    found = {"dashboard": connection.address, "nodes": len(nodes)}
    found |= {"free CPUs": sum(n.cpus for n in nodes), "free GPUs": sum(n.gpus for n in nodes)}
    if connection.ours:
        found |= {"CPUs": connection.ours.cpus, "folder": str(connection.ours.folder)}
    if json:
        print_json({name.lower().replace(" ", "_"): value for name, value in found.items()})
    else:
        out.print(
            facts({name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in found.items()})
        )


@app.command()
def down() -> None:
    """Stop the local cluster, with all jobs and applications on it."""
    from mhmoe_ray.cluster.local import stop_local

    out.print("stopped" if stop_local() else "no local cluster ran")


@app.command()
def use(
    name: NameArg,
    address: Annotated[
        str | None, typer.Option(help="Its dashboard, http://host:8265; needed once.", show_default=False)
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="A file with its token; by default what Ray itself would send.")
    ] = None,
) -> None:
    """Use this cluster from now on, unless --address or the environment names another one.

    For example `mhmoe cluster use lab --address http://head:8265 --token-file ~/lab-token`; `mhmoe cluster use local`
    goes back.
    """
    from mhmoe_ray.cluster import connect
    from mhmoe_ray.cluster.connect import normalised

    chosen = connect.use(name, normalised(address) if address else None, token_file)
    out.print(f"commands speak to {name}" + (f", {chosen.address}" if chosen else ", the cluster on this machine"))


@app.command("list")
def list_(json: JsonOption = False) -> None:
    """List the clusters that have names, and mark the one that commands use."""
    from mhmoe_ray.cluster.connect import LOCAL, read_contexts

    found = read_contexts()
    if json:
        print_json(asdict(found))
        return
    table = Table("", "name", "dashboard", "token", box=None, pad_edge=False)
    table.add_row("*" if found.current == LOCAL else "", LOCAL, "on this machine", "its own")
    for context in found.known.values():
        marked = "*" if found.current == context.name else ""
        table.add_row(marked, context.name, context.address, context.token_file or "as Ray finds it")
    out.print(table)


@app.command()
def forget(name: NameArg) -> None:
    """Forget a cluster's name; the cluster itself is not touched."""
    from mhmoe_ray.cluster import connect

    connect.forget(name)
    out.print(f"{name} is forgotten")


@app.command()
def render(
    site: Annotated[Path, typer.Argument(help="What the cluster is made of, for example cluster/site.yaml.")],
    into: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("cluster"),
    run: Annotated[Path | None, typer.Option(help="A run's spec, to train on it.", show_default=False)] = None,
    serve: Annotated[str | None, typer.Option(metavar="RUN", help="A run, to serve on it.", show_default=False)] = None,
    set_: SetOption = [],  # noqa: B006 - typer needs the list
    storage: StorageOption = STORAGE,
) -> None:
    """Write manifests for KubeRay, cluster files for `ray up`, a SLURM script, a container file, and what Prometheus
    and Grafana need. --set overrides keys of the run's spec; keys in MHMOE_API_KEYS are written as their hashes.

    For example `mhmoe cluster render cluster/site.yaml --into /tmp/lab --run jobs/quickstart.yaml`.
    """
    from mhmoe_ray.cli.serve_choice import KEYS, chosen, with_keys
    from mhmoe_ray.render.files import files
    from mhmoe_ray.serve.config import application_config
    from mhmoe_ray.spec import load_site

    if set_ and not run:
        raise typer.BadParameter("--set changes a run's spec; name one with --run")
    application = None
    if serve:
        found, path, spec = chosen(serve, None, storage, [])
        served = with_keys(spec.serve)
        if not served.keys:
            note.print(f"warning: whoever reaches the service may ask; serve.keys or {KEYS} limit it")
        environment = spec.cluster.runtime_env
        application = application_config(found.id, path, served, found.id, runtime_env=environment)
    rendered = files(load_site(site), read_spec(run, set_) if run else None, application)
    try:
        for name, text in rendered.items():
            target = into / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
            out.print(str(target), soft_wrap=True)
    except OSError as e:
        raise typer.BadParameter(f"--into {into}: {e.strerror or e}; name a folder that you can write to") from e
