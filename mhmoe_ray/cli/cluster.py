"""`mhmoe cluster` starts and stops the local Ray cluster, and gives names to other clusters.

`mhmoe doctor` checks this machine, the cluster and the storage, and explains what does not work.
"""

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

import mhmoe_ray as mh
from mhmoe_ray.api.defaults import LOCAL_CPUS
from mhmoe_ray.cli import options
from mhmoe_ray.cli.output import fact_table, note, out, print_json, print_line, print_note, print_table, show_activity
from mhmoe_ray.cli.verbs import SuggestingGroup

if TYPE_CHECKING:
    from mhmoe_ray.cluster.doctor import CheckResult


LEVEL_STYLES = {"ok": "green", "note": "dim", "warning": "yellow", "error": "bold red"}


def doctor(
    address: options.AddressOption = None,
    storage: options.StorageOption = options.STORAGE,
    json: options.JsonOption = False,
) -> None:
    """Check this machine, the cluster that commands would use, and storage, and say what to do.

    The exit code is 11 if a check finds an error; notes and warnings do not change it.
    """
    from mhmoe_ray.cluster.doctor import examine
    from mhmoe_ray.errors import DOCTOR_EXIT_CODE

    findings = []
    for finding in examine(address, storage):
        findings.append(finding)
        # Some checks wait for a cluster or a store, so each finding is shown as soon as it is known.
        if not json:
            _print_finding(finding)
    if json:
        print_json([f.as_json() for f in findings])
    if any(f.level == "error" for f in findings):
        raise typer.Exit(DOCTOR_EXIT_CODE)


def _print_finding(finding: "CheckResult") -> None:
    level = Text(f"{finding.level:<8}", style=LEVEL_STYLES[finding.level])
    out.print(level, Text(f"{finding.check}: {finding.message}"), soft_wrap=True)
    if finding.level in ("warning", "error"):
        out.print(Text(f"{'':<9}{finding.fix}", style="dim"), soft_wrap=True)


app = typer.Typer(
    cls=SuggestingGroup,
    help="Ray clusters: one on this machine to start and stop, others to choose.",
    no_args_is_help=True,
)

NameArg = Annotated[str, typer.Argument(metavar="NAME", help="Name of a cluster; `local` is the one on this machine.")]


@app.command("up")
def start_cluster(
    cpus: Annotated[int, typer.Option(min=1, help="Logical CPUs; may be more than there are cores.")] = LOCAL_CPUS,
) -> None:
    """Start the local cluster, unless it runs. Only you can use it: it requires a token and listens on loopback."""
    show_activity("starting Ray")
    from mhmoe_ray.cluster.local import start_local

    cluster = start_local(cpus)
    print_line(f"running: {cluster.address}, {cluster.cpus} CPUs")


@app.command()
def status(address: options.AddressOption = None, json: options.JsonOption = False) -> None:
    """Show the cluster that commands use: its nodes, and their free CPUs and GPUs."""
    from mhmoe_ray.cluster.connect import connect_if_running, dashboard_command
    from mhmoe_ray.cluster.nodes import free_nodes

    # `connect_if_running` is used, because a command that only looks at the local cluster must not start it.
    connection = connect_if_running(address)
    if connection is None:
        print_json(None) if json else out.print("no local cluster runs")
        return
    nodes = free_nodes(connection, None)
    cluster_state = {"dashboard": connection.address, "nodes": len(nodes)}
    cluster_state |= {"free CPUs": sum(n.cpus for n in nodes), "free GPUs": sum(n.gpus for n in nodes)}
    if cluster := connection.local_cluster:
        cluster_state |= {"CPUs": cluster.cpus, "folder": str(cluster.folder)}
    if json:
        # The names of the table are the keys of the JSON object: "free CPUs" becomes free_cpus.
        print_json({name.lower().replace(" ", "_"): value for name, value in cluster_state.items()})
    else:
        texts = {n: f"{value:g}" if isinstance(value, float) else str(value) for n, value in cluster_state.items()}
        texts["dashboard"] += f" ({dashboard_command(connection.address)})"
        out.print(fact_table(texts))
        if cluster:
            # The command has a line of its own, which does not wrap, so that it can be copied.
            print_line(f"\nRay's own commands work with these variables:\n{cluster.ray_command}")


@app.command("dashboard")
def open_dashboard(
    no_open: Annotated[bool, typer.Option("--no-open", help="Only print the address.")] = False,
    address: options.AddressOption = None,
) -> None:
    """Open the dashboard of Ray, with its jobs, logs and nodes, in a browser.

    Where there is no browser or no terminal, only its address is printed.
    """
    import webbrowser

    from mhmoe_ray.cluster.connect import connect

    connection = connect(address)
    print_line(connection.address)
    if token := connection.token:
        print_note(f"the page asks for the cluster's token; to print the token: {token.print_command}")
    # Without a display, Python would choose a text browser, which cannot show the page.
    has_display = sys.platform != "linux" or any(map(os.environ.get, ("BROWSER", "DISPLAY", "WAYLAND_DISPLAY")))
    if has_display and sys.stdout.isatty() and not no_open:
        webbrowser.open(connection.address)


@app.command("down")
def stop_cluster() -> None:
    """Stop the local cluster, with all jobs and applications on it."""
    show_activity("stopping Ray")
    from mhmoe_ray.cluster.local import stop_local

    out.print("stopped" if stop_local() else "no local cluster ran")


@app.command()
def use(
    name: NameArg,
    address: Annotated[
        str | None, typer.Option(help="The cluster's dashboard, http://host:8265; needed once.", show_default=False)
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="A file with the cluster's token; by default Ray's own token.")
    ] = None,
) -> None:
    """Use this cluster from now on, unless --address or the environment names another one.

    For example `mhmoe cluster use lab --address http://head:8265 --token-file ~/lab-token`; `mhmoe cluster use local`
    goes back to the local cluster.
    """
    from mhmoe_ray.cluster import connect
    from mhmoe_ray.cluster.connect import normalised

    cluster = connect.use(name, normalised(address) if address else None, token_file)
    out.print(f"commands now use {name}" + (f", {cluster.address}" if cluster else ", the cluster on this machine"))


@app.command("list")
def list_(json: options.JsonOption = False) -> None:
    """List the clusters that have names, and mark the one that commands use."""
    from mhmoe_ray.cluster.connect import LOCAL, read_named_clusters

    named_clusters = read_named_clusters()
    if json:
        # Scripts read these keys, so the keys must not change when an attribute is renamed.
        print_json(
            {"current": named_clusters.current, "known": {n: asdict(c) for n, c in named_clusters.by_name.items()}}
        )
        return
    rows = [(LOCAL, "on this machine", "its own")]
    rows += [(c.name, c.address, c.token_file or "Ray's own") for c in named_clusters.by_name.values()]
    columns = ["", "name", "dashboard", "token"]
    marked_rows = [("*" if row[0] == named_clusters.current else "", *row) for row in rows]
    print_table(columns, marked_rows, names=columns)


@app.command()
def forget(name: NameArg) -> None:
    """Forget a cluster's name; the cluster itself is not touched."""
    from mhmoe_ray.cluster import connect

    connect.forget(name)
    out.print(f"{name} is forgotten")


@app.command()
def render(
    site: Annotated[Path, typer.Argument(help="A description of the cluster, such as cluster/site.yaml.")],
    target_folder: Annotated[Path, typer.Option("--into", help="Folder to write to.")] = Path("cluster"),
    run: Annotated[Path | None, typer.Option(help="Spec of a run to train on it.", show_default=False)] = None,
    serve: Annotated[str | None, typer.Option(metavar="RUN", help="A run to serve on it.", show_default=False)] = None,
    set_: options.SetOption = [],  # noqa: B006 - typer needs the list
    storage: options.SpecStorageOption = None,
    trust_run: options.TrustOption = False,
) -> None:
    """Write manifests for KubeRay, cluster files for `ray up`, a SLURM script, a container file, and configurations of
    Prometheus and Grafana.

    --set overrides keys of the run's spec; API keys in MHMOE_API_KEYS are written as their hashes. For example `mhmoe
    cluster render cluster/site.yaml --into /tmp/lab`.
    """
    from mhmoe_ray.api.serve_target import API_KEYS_VARIABLE, resolve_target, with_environment_keys
    from mhmoe_ray.render.files import render_files, secret_advice
    from mhmoe_ray.serving.config import application_config
    from mhmoe_ray.spec import load_site

    if set_ and not run:
        raise typer.BadParameter("--set changes a run's spec; name one with --run")
    application = None
    if serve:
        run_dir, path, spec = resolve_target(serve, None, storage, [], print_note, trust_run)
        serve_spec = with_environment_keys(spec.serve)
        if not serve_spec.keys:
            note.print(
                f"warning: the service answers everybody who reaches it; {API_KEYS_VARIABLE} or serve.keys limit it"
            )
        environment = spec.cluster.runtime_env
        application = application_config(run_dir.id, path, serve_spec, run_dir.id, runtime_env=environment)
    site_spec = load_site(site)
    if "@sha256:" not in site_spec.image:
        note.print(
            f"warning: {site_spec.image} may become another image; give its digest as image of {site}: NAME@sha256:..."
        )
    run_spec = mh.load_spec(run, set_) if run else None
    rendered = render_files(site_spec, run_spec, application)
    for advice in secret_advice(site_spec, run_spec, application):
        note.print(advice)
    try:
        for name, text in rendered.items():
            target = target_folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
            print_line(str(target))
    except OSError as e:
        # If the folder cannot be written to, the user gave a wrong --into, so this is a usage error.
        raise typer.BadParameter(
            f"--into {target_folder}: {e.strerror or e}; name a folder that you can write to"
        ) from e
