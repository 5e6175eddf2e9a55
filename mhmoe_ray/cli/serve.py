"""`mhmoe serve`: serve checkpoints of runs through an OpenAI-compatible API, on Ray Serve."""

import os
from secrets import token_hex
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mhmoe_ray.cli.common import (
    STORAGE,
    AddressOption,
    CheckpointOption,
    JsonOption,
    SetOption,
    StorageOption,
    detach_on_interrupt,
    note,
    out,
    pick_checkpoint,
    print_json,
    print_note,
)
from mhmoe_ray.cli.verbs import SuggestingGroup

if TYPE_CHECKING:
    from mhmoe_ray.cluster.connect import Connection
    from mhmoe_ray.cluster.serving import Application
    from mhmoe_ray.runs.directory import RunDir


app = typer.Typer(cls=SuggestingGroup, help="Serve checkpoints.", no_args_is_help=True)

APPLICATION = "mhmoe"
# Number of CPUs that a local cluster gets in addition to those of the replicas, for the other processes that run on it.
SERVE_CPUS = 1
API_KEY_VARIABLE = "MHMOE_API_KEY"

NameArg = Annotated[str, typer.Argument(metavar="[NAME]", help="Name of the application; mhmoe by default.")]


@app.command()
def deploy(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="[RUN|SPEC|CHECKPOINT]",
            help="A run (its id, the beginning of one, or its path), a spec file (its newest run, served with its "
            "settings), or the folder of a checkpoint. The newest run by default.",
        ),
    ] = None,
    set_: SetOption = [],  # noqa: B006 - typer needs the list
    checkpoint: CheckpointOption = None,
    replicas: Annotated[
        str | None,
        typer.Option(metavar="N|A..B", help="Number of replicas; with A..B, Serve adds and removes replicas."),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(metavar="torch|vllm", help="Engine that computes; vllm must be installed where replicas run."),
    ] = None,
    name: Annotated[
        str,
        typer.Option(help="Name of the application; a cluster may have several. All but mhmoe answer at /NAME."),
    ] = APPLICATION,
    storage: StorageOption = STORAGE,
    address: AddressOption = None,
) -> None:
    """Serve a run's checkpoint without converting it, in place of the application that has this name now."""
    from mhmoe_ray.cli import jobs
    from mhmoe_ray.cli.serve_choice import API_KEYS_VARIABLE, option_overrides, resolve_target, with_environment_keys
    from mhmoe_ray.serve.config import application_config

    run_dir, path, spec = resolve_target(target, checkpoint, storage, [*set_, *option_overrides(replicas, engine)])
    spec = spec.model_copy(update={"serve": with_environment_keys(spec.serve)})
    if spec.serve.host not in ("127.0.0.1", "localhost", "::1") and not spec.serve.keys:
        note.print(
            f"warning: any client that reaches {spec.serve.host}:{spec.serve.port} may send requests; set serve.keys "
            f"or {API_KEYS_VARIABLE} to require a key"
        )
    # A local cluster cannot grow, so one that is started now must have room for the largest number of replicas.
    cpus = spec.serve.replicas.max * spec.serve.cpus_per_replica + SERVE_CPUS
    connection = jobs.connect_to_cluster(spec.cluster, [run_dir.path], cpus, address)
    config = application_config(name, path, spec.serve, run_dir.id, _route_prefix(name), spec.cluster.runtime_env)
    application = _deploy(run_dir, connection, config, spec.serve.host, spec.serve.port, f"of {run_dir.id}")
    hint = "ask it" if application.reachable else "ask it on the cluster's machine"
    out.print(
        f"serving {run_dir.id} at {application.url}/v1/completions; {hint}: {curl_command(application.url)}",
        soft_wrap=True,
    )


@app.command()
def update(name: NameArg = APPLICATION, checkpoint: CheckpointOption = None, address: AddressOption = None) -> None:
    """Serve a newer checkpoint of the same run.

    New replicas start before old ones end, so the cluster needs room for both, unless the application was deployed
    with `--set serve.surge=false`. Old replicas finish the requests that they have begun. If this checkpoint is served
    already, nothing changes; if its deployment failed, it is tried again.
    """
    from mhmoe_ray.cluster import serving
    from mhmoe_ray.cluster.connect import connect
    from mhmoe_ray.runs.directory import RunDir
    from mhmoe_ray.storage import location

    connection = connect(address)
    config, host, port = serving.deployed_config(connection, name)
    previous_path = location(config["args"]["checkpoint"])
    path, _ = pick_checkpoint(RunDir.of_checkpoint(previous_path), checkpoint, verify_hashes=False)
    remark = f"in place of {previous_path.name}"
    if path.name == previous_path.name:
        # Serve also keeps the configuration of an update that failed, so only the status tells whether the checkpoint
        # in the configuration is served.
        status = _application_status(connection, name)
        if status == "DEPLOYING":
            _wait_until_running(connection, name, f"{path.name} is being deployed already")
        if status in ("DEPLOYING", "RUNNING"):
            out.print(f"{path.name} is {'' if checkpoint else 'the newest checkpoint, and is '}served")
            return
        remark = "again"
    config["args"] = {**config["args"], "checkpoint": str(path)}
    _deploy(RunDir.of_checkpoint(path), connection, config, host, port, remark)
    out.print(f"serving {path.name}")


@app.command()
def status(address: AddressOption = None, json: JsonOption = False) -> None:
    """Show what is served, and how busy it is (with the key in MHMOE_API_KEY, if the server requires keys)."""
    from dataclasses import asdict

    from mhmoe_ray.cluster import serving
    from mhmoe_ray.cluster.connect import connect

    applications = serving.applications(connect(address))
    # Each of these applications gets the key, which is a secret. Applications that are not from this project must not
    # see it, so they are left out.
    our_applications = [a for a in applications if a.checkpoint and a.status == "RUNNING"]
    key = os.environ.get(API_KEY_VARIABLE, "").strip()
    stats = {a.name: serving.application_stats(a, key or None) for a in our_applications}
    if json:
        print_json([{**asdict(a), "stats": stats.get(a.name)} for a in applications])
        return
    table = Table("application", "status", "url", "message", box=None, pad_edge=False)
    for a in applications:
        table.add_row(a.name, a.status, a.url, a.message)
    out.print(table if applications else "nothing is served")
    for name, application_stats in stats.items():
        if isinstance(application_stats, dict):
            out.print(f"\n{name}: {application_stats['model']}", style="bold")
            out.print(_load_table(application_stats["replicas"]))
        else:
            out.print(f"\n{name}: {application_stats}", soft_wrap=True)


@app.command("down")
def stop_serving(name: NameArg = APPLICATION, address: AddressOption = None) -> None:
    """Stop serving an application."""
    from mhmoe_ray.cluster import serving
    from mhmoe_ray.cluster.connect import connect
    from mhmoe_ray.cluster.serve_removal import remove

    connection = connect(address)
    with detach_on_interrupt(f"Serve goes on. `mhmoe serve down {name}` waits for it again"):
        remove(connection, name, print_note)
    remaining_names = [a.name for a in serving.applications(connection)]
    out.print(f"still served: {', '.join(remaining_names)}" if remaining_names else "nothing is served any more")


def _deploy(
    run: "RunDir", connection: "Connection", config: dict[str, Any], host: str, port: int, remark: str
) -> "Application":
    """Deploy an application and return it when it answers.

    Args:
        run: the run whose checkpoint is served; its directory records that.
        connection: connection to the cluster.
        config: Serve's configuration of the application.
        host: address that Serve's proxy listens on.
        port: port that Serve's proxy listens on.
        remark: end of the line that is printed while the application is deployed.
    """
    from mhmoe_ray.cluster import serving
    from mhmoe_ray.storage import location

    name, checkpoint = config["name"], location(config["args"]["checkpoint"]).name
    # Serve ignores a configuration that it already has, so it starts a failed application again only if something
    # changes. A random argument is therefore added.
    if _application_status(connection, name) in ("DEPLOY_FAILED", "UNHEALTHY"):
        config["args"]["again"] = token_hex(3)
    url = serving.deploy(connection, config, host, port)
    # The deployment is recorded before the wait, because Serve continues to deploy and may succeed even if this command
    # ends early.
    _record_deployment(run, connection, name, url, checkpoint)
    return _wait_until_running(connection, name, f"deploying {checkpoint} {remark}")


def _application_status(connection: "Connection", name: str) -> str | None:
    """Return Serve's status of an application; None if the cluster has no application of this name."""
    from mhmoe_ray.cluster import serving

    return next((a.status for a in serving.applications(connection) if a.name == name), None)


def _wait_until_running(connection: "Connection", name: str, message: str) -> "Application":
    """Print the message, wait until the application answers, and return the application."""
    from mhmoe_ray.cluster import serving

    with detach_on_interrupt(f"Serve goes on. See: mhmoe serve status; to end it: mhmoe serve down {name}"):
        note.print(message)
        return serving.wait_until_running(connection, name, say=print_note)


def _record_deployment(run: "RunDir", connection: "Connection", application: str, url: str, checkpoint: str) -> None:
    """Record in the run directory that the run is served, so that `mhmoe status` can ask the application."""
    from mhmoe_ray.errors import StorageError
    from mhmoe_ray.runs import events

    try:
        events.record(
            run, "served", application=application, url=url, address=connection.address, checkpoint=checkpoint
        )
    # A checkpoint can be served even if its run directory cannot be written, so this is only a warning.
    except StorageError as e:
        note.print(f"warning: {e}", soft_wrap=True)


def curl_command(url: str) -> str:
    """Return a shell command that sends a completion request to the server at `url`."""
    body = '{"prompt": "Fellow citizens", "max_tokens": 32}'
    return f"curl {url}/v1/completions -H 'Content-Type: application/json' -d '{body}'"


def _route_prefix(name: str) -> str:
    """Return the URL path of an application: / for the default name, else /NAME."""
    return "/" if name == APPLICATION else f"/{name}"


def _load_table(replicas: list[dict[str, Any]]) -> Table:
    """Return a table of the load of an application's replicas.

    Args:
        replicas: statistics of each replica, as the application's API reports them.
    """
    columns = (
        "replica",
        "running",
        "waiting",
        "cache",
        "tokens/s",
        "queue",
        "first token",
        "each token",
        "batch",
        "least expert",
    )
    table = Table(*columns, box=None, pad_edge=False)
    for stats in replicas:
        batch = stats["step_tokens"] / stats["steps"] if stats["steps"] else None
        table.add_row(
            stats["replica"],
            str(stats["running"]),
            str(stats["waiting"]),
            f"{stats['cache_used']:.0%}",
            f"{stats['answer_rate']:.1f}",
            *(
                _format_milliseconds(stats[f"{phase}_seconds"]["mean"])
                for phase in ("queue", "first_token", "each_token")
            ),
            "-" if batch is None else f"{batch:.1f}",
            _least_expert_load(stats["count_LE"]),
        )
    return table


def _format_milliseconds(mean_seconds: float | None) -> str:
    return "-" if mean_seconds is None else f"{1000 * mean_seconds:.1f} ms"


def _least_expert_load(count_LE: list[list[int]]) -> str:
    """Format the load of the least used expert of all layers, relative to an even share; "-" before any load.

    Args:
        count_LE: number of routes to each expert of each layer.
    """
    # A layer without routes is left out, because its sum is 0. It has no routes before the first request.
    shares = [min(counts) * len(counts) / sum(counts) for counts in count_LE if sum(counts)]
    return f"{min(shares):.2f}" if shares else "-"
