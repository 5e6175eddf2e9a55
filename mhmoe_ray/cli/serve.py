"""`mhmoe serve`: serve checkpoints of runs through an OpenAI-compatible API, on Ray Serve."""

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mhmoe_ray.api.defaults import APPLICATION
from mhmoe_ray.cli import options
from mhmoe_ray.cli.output import (
    detach_on_interrupt,
    out,
    print_json,
    print_line,
    print_note,
    print_table,
    show_activity,
)
from mhmoe_ray.cli.verbs import SuggestingGroup

if TYPE_CHECKING:
    from mhmoe_ray.api.service import Service


app = typer.Typer(cls=SuggestingGroup, help="Serve checkpoints.", no_args_is_help=True)

NameArg = Annotated[str, typer.Argument(metavar="[NAME]", help="Name of the application; mhmoe by default.")]


@app.command()
def deploy(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="[RUN|SPEC|CHECKPOINT]",
            help="A run (its id, the beginning of one, or its path; or RUN@STEP), a spec file (its newest run, served "
            "with its settings), or the folder of a checkpoint. The newest run by default.",
        ),
    ] = None,
    set_: options.SetOption = [],  # noqa: B006 - typer needs the list
    checkpoint: options.CheckpointOption = None,
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
    storage: options.SpecStorageOption = None,
    address: options.AddressOption = None,
    trust_run: options.TrustOption = False,
) -> None:
    """Serve a run's checkpoint without converting it, in place of any application of the same name."""
    show_activity("looking for the checkpoint")
    from mhmoe_ray.api.service import serve
    from mhmoe_ray.checkpoint.manifest import stored_manifest
    from mhmoe_ray.runs.directory import RunDir
    from mhmoe_ray.serving.family import serving_of

    service = serve(
        target,
        checkpoint=checkpoint,
        overrides=[*set_, *option_overrides(replicas, engine)],
        name=name,
        storage=storage,
        address=address,
        wait=False,
        trust_run=trust_run,
        on_note=print_note,
    )
    _wait_until_running(service)
    application, run_dir = service.application, RunDir.of_checkpoint(service.checkpoint)
    hint = "ask it" if application.reachable else "ask it on the cluster's machine"
    model = stored_manifest(service.checkpoint).model
    route, command, page = serving_of(model.kind).request_example(model, run_dir, application.url)
    print_line(f"serving {run_dir.id} at {application.url}/{route}; {hint}: {command}")
    print_line(f"its web page is {application.url}/{page}")


def option_overrides(replicas: str | None, engine: str | None) -> list[str]:
    """Return the overrides of the options --replicas, a number or a range like 1..4, and --engine."""
    overrides = []
    if replicas is not None:
        low, dots, high = replicas.partition("..")
        overrides.append(f"serve.replicas={{min: {low}, max: {high}}}" if dots else f"serve.replicas={replicas}")
    if engine is not None:
        overrides.append(f"serve.engine={engine}")
    return overrides


@app.command()
def update(
    name: NameArg = APPLICATION, checkpoint: options.CheckpointOption = None, address: options.AddressOption = None
) -> None:
    """Serve a newer checkpoint of the same run.

    New replicas start before old ones end, so the cluster needs room for both, unless the application was deployed
    with `--set serve.surge=false`. Old replicas finish the requests that they have begun. If this checkpoint is served
    already, nothing changes; if its deployment failed, it is tried again.
    """
    show_activity("connecting to the cluster")
    from mhmoe_ray.api.service import Service
    from mhmoe_ray.cluster.connect import connect

    service = Service(name, connect(address))
    result = service.update(checkpoint, wait=False, on_note=print_note)
    _wait_until_running(service)
    if result.is_deployed:
        out.print(f"serving {result.checkpoint}")
    else:
        out.print(f"{result.checkpoint} is {'' if checkpoint else 'the newest checkpoint, and is '}served")


@app.command()
def adapters(
    name: NameArg = APPLICATION,
    add: Annotated[
        list[str],
        typer.Option(metavar="NAME=RUN", help="Adapter to add or replace: RUN, RUN@STEP or a checkpoint's folder."),
    ] = [],  # noqa: B006 - typer needs the list
    remove: Annotated[list[str], typer.Option(metavar="NAME", help="Adapter to remove.")] = [],  # noqa: B006
    address: options.AddressOption = None,
) -> None:
    """List the adapters of an application, which requests name as their model, or add and remove some.

    The application answers meanwhile, and its replicas stay. It needs a `serve.max_adapters` that is large enough.
    """
    show_activity("connecting to the cluster")
    from mhmoe_ray.api.service import Service
    from mhmoe_ray.cluster.connect import connect

    targets = {}
    for text in add:
        adapter, _, target = text.partition("=")
        if not (adapter and target):
            raise typer.BadParameter(f"{text} is not NAME=RUN", param_hint="--add")
        targets[adapter] = target
    service = Service(name, connect(address))
    if targets or remove:
        service.change_adapters(targets, remove, on_note=print_note)
    columns = ["adapter", "checkpoint"]
    if rows := [(adapter, str(path)) for adapter, path in service.adapters.items()]:
        print_table(columns, rows, names=columns)
    else:
        out.print(f"{name} has no adapters")


@app.command()
def status(address: options.AddressOption = None, json: options.JsonOption = False) -> None:
    """Show what is served, and how busy it is (with the key in MHMOE_API_KEY, if the server requires keys)."""
    from dataclasses import asdict

    from mhmoe_ray.api.service import API_KEY_VARIABLE
    from mhmoe_ray.cluster import serving
    from mhmoe_ray.cluster.connect import connect

    applications = serving.applications(connect(address))
    # The API key is a secret, which applications that are not from this project must not see.
    our_applications = [a for a in applications if a.checkpoint and a.status == "RUNNING"]
    key = os.environ.get(API_KEY_VARIABLE, "").strip()
    stats = {a.name: serving.application_stats(a, key or None) for a in our_applications}
    if json:
        print_json([{**asdict(a), "stats": stats.get(a.name)} for a in applications])
        return
    if applications:
        columns = ["application", "status", "url", "message"]
        rows = [(a.name, a.status, a.url, a.message) for a in applications]
        print_table(columns, rows, names=columns)
    else:
        out.print("nothing is served")
    for name, application_stats in stats.items():
        if isinstance(application_stats, dict):
            out.print(f"\n{name}: {application_stats['model']}", style="bold")
            out.print(_load_table(application_stats["replicas"]))
        else:
            out.print(f"\n{name}: {application_stats}", soft_wrap=True)


@app.command("down")
def stop_serving(name: NameArg = APPLICATION, address: options.AddressOption = None) -> None:
    """Stop serving an application."""
    show_activity("connecting to the cluster")
    from mhmoe_ray.api.service import Service
    from mhmoe_ray.cluster import serving
    from mhmoe_ray.cluster.connect import connect

    service = Service(name, connect(address))
    with detach_on_interrupt(f"Serve goes on. `mhmoe serve down {name}` waits for it again"):
        service.stop(print_note)
    remaining_names = [a.name for a in serving.applications(service.connection)]
    out.print(f"still served: {', '.join(remaining_names)}" if remaining_names else "nothing is served any more")


def _wait_until_running(service: "Service") -> None:
    hint = f"Serve goes on. See: mhmoe serve status; to end it: mhmoe serve down {service.name}"
    with detach_on_interrupt(hint):
        print_note("waiting until it answers; Ctrl-C ends the wait, not the deployment")
        service.wait(on_note=print_note)


def _load_table(replicas: list[dict[str, Any]]) -> Table:
    """Return a table of the load of an application's replicas, from the statistics that its API reports."""
    columns = ["replica", "running", "waiting", "cache", "tokens/s", "queue", "first token", "each token", "batch"]
    table = Table(*columns, "least expert", box=None, pad_edge=False)
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
    """Format the load of the least used expert of all layers, relative to an even share; "-" before the first load."""
    # A layer without routes, as before the first request, is left out, because its share would be divided by 0.
    shares = [min(counts) * len(counts) / sum(counts) for counts in count_LE if sum(counts)]
    return f"{min(shares):.2f}" if shares else "-"
