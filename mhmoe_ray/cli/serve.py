"""`mhmoe serve`: a run's checkpoint behind an OpenAI-compatible API, on Ray Serve."""

import typer
from rich.table import Table

from mhmoe_ray.cli.common import (
    STORAGE,
    AddressOption,
    CheckpointOption,
    JsonOption,
    RunArg,
    SetOption,
    StorageOption,
    note,
    out,
    pick_checkpoint,
    print_json,
)

app = typer.Typer(help="Serve a checkpoint.", no_args_is_help=True)

APPLICATION = "mhmoe"
START_SECONDS = 180.0
SERVE_CPUS = 1  # beside the replicas' own, for what else runs on a local cluster


@app.command()
def deploy(
    run: RunArg = None,
    set_: SetOption = [],  # noqa: B006 - typer needs the list
    checkpoint: CheckpointOption = None,
    storage: StorageOption = STORAGE,
    address: AddressOption = None,
) -> None:
    """Serve a run's checkpoint, as it lies, in place of the one that is served now."""
    from mhmoe_ray.cli import launch
    from mhmoe_ray.cluster import serving
    from mhmoe_ray.errors import SpecError
    from mhmoe_ray.runs.layout import find_run
    from mhmoe_ray.serve.config import application_config
    from mhmoe_ray.spec import load_deploy_spec, parse_overrides

    for keys, _ in parse_overrides(set_):
        if keys[0] != "serve" and keys != ["cluster", "shared_filesystem"]:
            raise SpecError(f"override {'.'.join(keys)}", "serving does not use it", "set keys of the serve section")
    found = find_run(run, storage)
    spec = load_deploy_spec(None if found.is_imported else found.spec_file, set_)
    path, _ = pick_checkpoint(found, checkpoint)
    cpus = spec.serve.replicas * spec.serve.cpus_per_replica + SERVE_CPUS
    connection = launch.cluster_for(spec.cluster, [found.path], cpus, address)
    config = application_config(APPLICATION, path, spec.serve, found.id)
    serving.deploy(connection, config, spec.serve.host, spec.serve.port)
    note.print(f"deploying {path.name} of {found.id}")
    serving.wait_until_running(connection, APPLICATION, START_SECONDS)
    url = f"http://{spec.serve.host}:{spec.serve.port}"
    out.print(f"serving {found.id} at {url}/v1/completions; ask it: {curl_line(url)}", soft_wrap=True)


def curl_line(url: str) -> str:
    body = '{"prompt": "Fellow citizens", "max_tokens": 32}'
    return f"curl {url}/v1/completions -H 'Content-Type: application/json' -d '{body}'"


@app.command()
def status(address: AddressOption = None, json: JsonOption = False) -> None:
    """Show what is served."""
    from dataclasses import asdict

    from mhmoe_ray.cluster import serving
    from mhmoe_ray.cluster.connect import connect

    found = serving.applications(connect(address))
    if json:
        print_json([asdict(a) for a in found])
        return
    table = Table("application", "status", "url", "message", box=None, pad_edge=False)
    for a in found:
        table.add_row(a.name, a.status, a.url, a.message)
    out.print(table if found else "nothing is served")


@app.command()
def down(address: AddressOption = None) -> None:
    """Stop serving."""
    from mhmoe_ray.cluster import serving
    from mhmoe_ray.cluster.connect import connect

    serving.remove(connect(address), APPLICATION)
    out.print("nothing is served any more")
