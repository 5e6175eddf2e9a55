"""`mhmoe data prepare`: raw text to packed shards, as a job on the cluster."""

import time
from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from mhmoe_ray.cli import connecting
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
from mhmoe_ray.cli.job import Job
from mhmoe_ray.cli.preparing import PreparingView

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

    A preparation that was interrupted goes on: text that was tokenised with the same settings is not tokenised again.
    """
    from mhmoe_ray.data.prepare.work import clear
    from mhmoe_ray.data.shards.manifest import check_recipe, read_data_manifest
    from mhmoe_ray.data.sources import find_files

    resolved = read_spec(spec, set_)
    folder = resolved.data.prepared
    manifest = read_data_manifest(folder)
    if manifest is None:
        find_files(resolved.data)
        connection = connecting.cluster_for(resolved.cluster, [resolved.data.prepared], resolved.cluster.cpus, address)
        manifest = _run(resolved, connection)
    check_recipe(folder, manifest, resolved)
    clear(folder)  # a job that was killed when all was done could not
    if json:
        print_json(manifest.model_dump())
        return
    _show(manifest)
    out.print(f"in {folder}", soft_wrap=True)


def _run(spec: "RunSpec", connection: "Connection") -> "DataManifest":
    """Submit the job and follow it to its end.

    Raises:
        MhmoeError: it failed, as it says itself.
    """
    from mhmoe_ray.cluster.dashboard import Patience
    from mhmoe_ray.data.prepare.work import shared_folder
    from mhmoe_ray.data.shards.manifest import read_data_manifest
    from mhmoe_ray.spec import dump_spec
    from mhmoe_ray.spec.load import packed

    folder, env = spec.data.prepared, {"MHMOE_SPEC": packed(dump_spec(spec))}
    job = Job.start(connection, spec.cluster, "mhmoe_ray.data.prepare.job", f"prepare-{folder.name}", env)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.fields[figures]}"))
    patience = Patience(say)
    with job.detaching(), Progress(*columns, console=note, disable=not note.is_terminal, transient=True) as bar:
        view = PreparingView(shared_folder(spec), bar)
        while patience.ask(lambda: job.is_running, True):
            view.refresh()
            time.sleep(POLL_SECONDS)
    manifest = read_data_manifest(folder)
    if manifest is None:
        raise job.error(f"prepared data {folder}")
    return manifest


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
