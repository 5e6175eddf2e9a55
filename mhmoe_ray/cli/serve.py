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
    detaching,
    note,
    out,
    pick_checkpoint,
    print_json,
    say,
)
from mhmoe_ray.cli.verbs import Verbs

if TYPE_CHECKING:
    from mhmoe_ray.cluster.connect import Connection
    from mhmoe_ray.cluster.serving import Application
    from mhmoe_ray.runs.directory import RunDir


app = typer.Typer(cls=Verbs, help="Serve checkpoints.", no_args_is_help=True)

APPLICATION = "mhmoe"
SERVE_CPUS = 1  # beside the replicas' own, for what else runs on a local cluster
KEY = "MHMOE_API_KEY"

NameArg = Annotated[str, typer.Argument(metavar="[NAME]", help="The application's; mhmoe by default.")]


@app.command()
def deploy(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="[RUN|SPEC|CHECKPOINT]",
            help="A run: an id, a unique beginning of one, or a path. A spec file: its newest run, served as it says. "
            "A folder of a checkpoint. The newest run by default.",
        ),
    ] = None,
    set_: SetOption = [],  # noqa: B006 - typer needs the list
    checkpoint: CheckpointOption = None,
    replicas: Annotated[str | None, typer.Option(metavar="N|A..B", help="Processes that serve it.")] = None,
    engine: Annotated[
        str | None, typer.Option(metavar="torch|vllm", help="What computes; vllm must be installed where replicas run.")
    ] = None,
    name: Annotated[
        str,
        typer.Option(help="Of the application, of which a cluster may have several; all but mhmoe answer at /NAME."),
    ] = APPLICATION,
    storage: StorageOption = STORAGE,
    address: AddressOption = None,
) -> None:
    """Serve a run's checkpoint, as it is, in place of what is served under that name now."""
    from mhmoe_ray.cli import jobs
    from mhmoe_ray.cli.serve_choice import KEYS, chosen, sizes_set, with_keys
    from mhmoe_ray.serve.config import application_config

    found, path, spec = chosen(target, checkpoint, storage, [*set_, *sizes_set(replicas, engine)])
    spec = spec.model_copy(update={"serve": with_keys(spec.serve)})
    if spec.serve.host not in ("127.0.0.1", "localhost", "::1") and not spec.serve.keys:
        note.print(
            f"warning: whoever reaches {spec.serve.host}:{spec.serve.port} may ask; serve.keys or {KEYS} limit it"
        )
    cpus = spec.serve.replicas.max * spec.serve.cpus_per_replica + SERVE_CPUS
    connection = jobs.cluster_for(spec.cluster, [found.path], cpus, address)
    config = application_config(name, path, spec.serve, found.id, _route(name), spec.cluster.runtime_env)
    made = _deployed(found, connection, config, spec.serve.host, spec.serve.port, f"of {found.id}")
    ask = "ask it" if made.reachable else "ask it on the cluster's machine"
    out.print(f"serving {found.id} at {made.url}/v1/completions; {ask}: {curl_line(made.url)}", soft_wrap=True)


@app.command()
def update(name: NameArg = APPLICATION, checkpoint: CheckpointOption = None, address: AddressOption = None) -> None:
    """Serve a newer checkpoint of the same run.

    New replicas start first, for which there must be room unless it was deployed with `--set serve.surge=false`; old
    replicas finish the requests that they have begun.
    """
    from mhmoe_ray.cluster import serving
    from mhmoe_ray.cluster.connect import connect
    from mhmoe_ray.runs.directory import RunDir
    from mhmoe_ray.storage import location

    connection = connect(address)
    config, host, port = serving.declared(connection, name)
    before = location(config["args"]["checkpoint"])
    path, _ = pick_checkpoint(RunDir.of_checkpoint(before), checkpoint, hashed=False)
    how = f"in place of {before.name}"
    if path.name == before.name:
        # Serve keeps the configuration of an update that failed, too.
        status = _status(connection, name)
        if status == "DEPLOYING":
            _running(connection, name, f"{path.name} is being deployed already")
        if status in ("DEPLOYING", "RUNNING"):
            out.print(f"{path.name} is {'' if checkpoint else 'the newest checkpoint, and is '}served")
            return
        how = "again"
    config["args"] = {**config["args"], "checkpoint": str(path)}
    _deployed(RunDir.of_checkpoint(path), connection, config, host, port, how)
    out.print(f"serving {path.name}")


@app.command()
def status(address: AddressOption = None, json: JsonOption = False) -> None:
    """Show what is served, and how busy it is (with the key in MHMOE_API_KEY, if the server requires keys)."""
    from dataclasses import asdict

    from mhmoe_ray.cluster import serving
    from mhmoe_ray.cluster.connect import connect

    found = serving.applications(connect(address))
    # A key goes to applications of ours alone.
    ours = [a for a in found if a.checkpoint and a.status == "RUNNING"]
    key = os.environ.get(KEY, "").strip()
    stats = {a.name: serving.stats(a, key or None) for a in ours}
    if json:
        print_json([{**asdict(a), "stats": stats.get(a.name)} for a in found])
        return
    table = Table("application", "status", "url", "message", box=None, pad_edge=False)
    for a in found:
        table.add_row(a.name, a.status, a.url, a.message)
    out.print(table if found else "nothing is served")
    for name, told in stats.items():
        if isinstance(told, dict):
            out.print(f"\n{name}: {told['model']}", style="bold")
            out.print(_busy(told["replicas"]))
        else:
            out.print(f"\n{name}: {told}", soft_wrap=True)


@app.command()
def down(name: NameArg = APPLICATION, address: AddressOption = None) -> None:
    """Stop serving an application."""
    from mhmoe_ray.cluster import serving
    from mhmoe_ray.cluster.connect import connect
    from mhmoe_ray.cluster.serve_removal import remove

    connection = connect(address)
    with detaching(f"Serve goes on. `mhmoe serve down {name}` waits for it again"):
        remove(connection, name, say)
    left = [a.name for a in serving.applications(connection)]
    out.print(f"still served: {', '.join(left)}" if left else "nothing is served any more")


def _deployed(
    run: "RunDir", connection: "Connection", config: dict[str, Any], host: str, port: int, how: str
) -> "Application":
    """Deploy the application and return it when it answers.

    The run's directory records that it is served before that: Serve continues to deploy and may succeed, even if this
    command ends early.
    """
    from mhmoe_ray.cluster import serving
    from mhmoe_ray.storage import location

    name, checkpoint = config["name"], location(config["args"]["checkpoint"]).name
    if _status(connection, name) in ("DEPLOY_FAILED", "UNHEALTHY"):
        config["args"]["again"] = token_hex(3)
    url = serving.deploy(connection, config, host, port)
    _record(run, connection, name, url, checkpoint)
    return _running(connection, name, f"deploying {checkpoint} {how}")


def _status(connection: "Connection", name: str) -> str | None:
    from mhmoe_ray.cluster import serving

    return next((a.status for a in serving.applications(connection) if a.name == name), None)


def _running(connection: "Connection", name: str, line: str) -> "Application":
    """Print the line, wait until the application answers, and return it."""
    from mhmoe_ray.cluster import serving

    with detaching(f"Serve goes on. See: mhmoe serve status; to end it: mhmoe serve down {name}"):
        note.print(line)
        return serving.wait_until_running(connection, name, say=say)


def _record(run: "RunDir", connection: "Connection", application: str, url: str, checkpoint: str) -> None:
    """Record in the run directory that it is served, so that `mhmoe status` knows where to ask."""
    from mhmoe_ray.errors import StorageError
    from mhmoe_ray.runs import events

    try:
        events.record(
            run, "served", application=application, url=url, address=connection.address, checkpoint=checkpoint
        )
    except StorageError as e:  # a run directory that cannot be written is served all the same
        note.print(f"warning: {e}", soft_wrap=True)


def curl_line(url: str) -> str:
    body = '{"prompt": "Fellow citizens", "max_tokens": 32}'
    return f"curl {url}/v1/completions -H 'Content-Type: application/json' -d '{body}'"


def _route(name: str) -> str:
    return "/" if name == APPLICATION else f"/{name}"


def _busy(replicas: list[dict[str, Any]]) -> Table:
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
    for told in replicas:
        batch = told["step_tokens"] / told["steps"] if told["steps"] else None
        table.add_row(
            told["replica"],
            str(told["running"]),
            str(told["waiting"]),
            f"{told['cache_used']:.0%}",
            f"{told['answer_rate']:.1f}",
            *(_seconds(told[f"{what}_seconds"]["mean"]) for what in ("queue", "first_token", "each_token")),
            "-" if batch is None else f"{batch:.1f}",
            _least(told["count_LE"]),
        )
    return table


def _seconds(mean: float | None) -> str:
    return "-" if mean is None else f"{1000 * mean:.1f} ms"


def _least(count_LE: list[list[int]]) -> str:
    """Return the load of the least used expert of any layer, relative to an even share, as text."""
    shares = [min(counts) * len(counts) / sum(counts) for counts in count_LE if sum(counts)]
    return f"{min(shares):.2f}" if shares else "-"
