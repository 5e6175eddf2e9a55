"""`mhmoe ckpt`: show, verify, export and import checkpoints."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mhmoe_ray.cli import options
from mhmoe_ray.cli.formats import format_bytes, format_count
from mhmoe_ray.cli.output import activity_lines, fact_table, out, print_json, print_line, print_note, show_activity
from mhmoe_ray.cli.verbs import SuggestingGroup
from mhmoe_ray.terminal import Activity

if TYPE_CHECKING:
    from mhmoe_ray.runs.directory import RunDir
    from mhmoe_ray.storage import Location

app = typer.Typer(cls=SuggestingGroup, help="Inspect, verify, export and import checkpoints.", no_args_is_help=True)


@app.command()
def inspect(
    run: options.RunArg = None,
    checkpoint: options.CheckpointOption = None,
    storage: options.StorageOption = options.STORAGE,
    json: options.JsonOption = False,
) -> None:
    """Show a checkpoint: its position in training and in the data, the workers that wrote it, and its files."""
    show_activity("looking for the checkpoint")
    from mhmoe_ray.api.checkpoints import pick_checkpoint
    from mhmoe_ray.checkpoint.find import split_step
    from mhmoe_ray.checkpoint.manifest import PARTS
    from mhmoe_ray.planner.sizes import compute_sizes
    from mhmoe_ray.runs.directory import find_run

    run, checkpoint = split_step(run, checkpoint)
    run_dir = find_run(run, storage)
    # Only the checkpoint's manifest is shown, so the hashes of its files need not be verified.
    path, manifest = pick_checkpoint(run_dir, checkpoint, verify_hashes=False, on_note=print_note)
    if json:
        print_json({"run": run_dir.id, "name": path.name, "path": str(path), **manifest.model_dump(mode="json")})
        return
    parts = {p: [f.size for name, f in manifest.files.items() if name.startswith(f"{p}/")] for p in PARTS}
    moe, size = manifest.model.moe, compute_sizes(manifest.model)
    experts = f", {moe.experts} experts in each of {manifest.model.moe_layers} layers" if moe else ""
    rows: dict[str, str | None] = {
        "step": f"{manifest.step:,}",
        "tokens": f"{manifest.tokens:,}",
        "next sample": f"{manifest.position:,}",
        "written by": f"{format_count(manifest.world, 'worker')}, ep {manifest.ep}; any other number may read it",
        "model": f"{size.parameters:,} parameters{experts}",
        "adapter": f"rank {adapter.spec.rank}, of the base {adapter.base}" if (adapter := manifest.adapter) else None,
        **{
            part: f"{format_bytes(sum(file_sizes))} in {format_count(len(file_sizes), 'file')}"
            for part, file_sizes in parts.items()
            if file_sizes
        },
        "path": str(path),
    }
    out.print(fact_table(rows, f"{path.name} of {run_dir.id}"))


@app.command()
def verify(
    run: options.RunArg = None,
    other_model: Annotated[
        str | None,
        typer.Argument(
            metavar="OTHER",
            help="A second model to compare with: a run, the folder of a checkpoint, a folder in Hugging Face's "
            "layout, or hf:ORGANIZATION/NAME. The first may be any of these too.",
        ),
    ] = None,
    storage: options.StorageOption = options.STORAGE,
    json: options.JsonOption = False,
) -> None:
    """Check all checkpoints of a run, or that of RUN@STEP, or compare two models tensor by tensor, expert by expert.

    With one run, names, sizes and hashes of all files are compared with the manifests. A checkpoint without a manifest
    was never finished and does not count as damaged; nor does a checkpoint that the run has removed meanwhile because
    of keep_checkpoints. With two models, their weights and their logits on fixed tokens are compared. The exit code is
    8 if a checkpoint is damaged, or if the models differ by more than rounding to 16 bits.
    """
    if run is not None and other_model is not None:
        _compare(run, other_model, storage, json)
    else:
        _verify_run(run, storage, json)


def _compare(first_model: str, second_model: str, storage: str, json: bool) -> None:
    """Compare two models and print their differences. Those beyond rounding to 16 bits are a CheckpointError."""
    show_activity("comparing the models")
    from mhmoe_ray.checkpoint.huggingface.compare import compare_logits, compare_weights, open_model
    from mhmoe_ray.errors import CheckpointError

    locations = [_model_location(target, storage) for target in (first_model, second_model)]
    with open_model(locations[0]) as a, open_model(locations[1]) as b:
        findings = compare_weights(a, b)
        is_comparable = {f.kind for f in findings} <= {"rounded", "swapped", "zero", "different"}
        logits = compare_logits(a, b) if is_comparable else None
    differences = [finding for finding in findings if not finding.is_rounding]
    if json:
        rows = [finding._asdict() for finding in findings]
        print_json({"equal": not findings, "findings": rows, "logits": logits and logits._asdict()})
    else:
        for finding in differences:
            print_line(f"{finding.kind}: {finding.subject}: {finding.detail}")
        if rounded_count := len(findings) - len(differences):
            out.print(f"rounded: {rounded_count} tensors or experts are the other one's, rounded to 16 bits")
        if not findings:
            out.print("all tensors are equal")
        if logits is not None:
            choices = f"{logits.same_choices:.1%} of the most likely tokens are the same"
            out.print(f"logits: largest difference {logits.largest:.3g}; {choices}")
    # The differences are on stdout already; this error gives the command a nonzero exit code.
    if differences:
        reason = f"it differs from {second_model} in {len(differences)} places"
        raise CheckpointError(first_model, reason, "compare it with the model that it should be")


def _model_location(target: str, storage: str) -> "Location":
    """Return the location of a model that the user names: a folder, or the newest checkpoint of a run."""
    from mhmoe_ray.api.checkpoints import find_model_folder, pick_checkpoint
    from mhmoe_ray.runs.directory import RunDir

    folder = find_model_folder(target, storage)
    # The hashes are not verified here, because `open_model` reads the files and verifies them.
    if isinstance(folder, RunDir):
        return pick_checkpoint(folder, verify_hashes=False, on_note=print_note)[0]
    return folder


def _verify_run(run: str | None, storage: str, json: bool) -> None:
    """Compare the checkpoints that are named with their manifests, print the result, and raise an error for damage."""
    show_activity("looking for the run")
    from mhmoe_ray.checkpoint.find import find_checkpoint, split_step
    from mhmoe_ray.checkpoint.manifest import (
        committed_checkpoints,
        is_committed,
        read_manifest,
        uncommitted_checkpoints,
    )
    from mhmoe_ray.errors import CheckpointError
    from mhmoe_ray.runs.directory import find_run

    run, step = split_step(run)
    run_dir = find_run(run, storage)
    problems: dict[str, str | None] = {}
    dropped_names: list[str] = []
    paths = [find_checkpoint(run_dir, step)] if step else committed_checkpoints(run_dir)
    for i, path in enumerate(paths):
        activity_lines.show(Activity("verifying", f"{i + 1} of {len(paths)} checkpoints", i, len(paths)))
        try:
            read_manifest(path)
        except CheckpointError as error:
            # The run may have removed this checkpoint since it was listed, which is no damage.
            if is_committed(path):
                problems[path.name] = error.reason
            else:
                dropped_names.append(path.name)
        else:
            problems[path.name] = None
    # The removal of a checkpoint deletes its manifest first. A checkpoint that is being removed therefore looks
    # unfinished, and is left out here.
    unfinished = [] if step else uncommitted_checkpoints(run_dir)
    unfinished_names = [path.name for path in unfinished if path.name not in dropped_names]
    damaged = [name for name, reason in problems.items() if reason]
    if json:
        checkpoints = [{"name": name, "whole": not reason, "why": reason} for name, reason in problems.items()]
        print_json(
            {"run": run_dir.id, "checkpoints": checkpoints, "dropped": dropped_names, "unfinished": unfinished_names}
        )
    else:
        states: dict[str, str | None] = {name: reason or "whole" for name, reason in problems.items()}
        states |= dict.fromkeys(dropped_names, "dropped meanwhile") | dict.fromkeys(unfinished_names, "unfinished")
        out.print(fact_table(states, run_dir.id))
    # The table of checkpoints is on stdout already; this error gives the command a nonzero exit code.
    if damaged:
        raise CheckpointError(
            f"run {run_dir.id}", f"{len(damaged)} of {len(problems)} checkpoints are damaged", "resume skips them"
        )


@app.command()
def export(
    target_folder: Annotated[Path, typer.Option("--to", help="Folder to write; it must not exist, or be empty.")],
    run: options.RunArg = None,
    checkpoint: options.CheckpointOption = None,
    storage: options.StorageOption = options.STORAGE,
    merge: Annotated[bool, typer.Option("--merge", help="Write the sums of base and adapter as one model.")] = False,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Exported base of an adapter, or hf:ORGANIZATION/NAME; by default what the run started from.",
        ),
    ] = None,
) -> None:
    """Write a run's checkpoint in Hugging Face's layout: safetensors by expert, their index, config.json and tokenizer.

    A model of exactly Mixtral's shape loads in transformers as it is. Of a run with train.adapter, the adapter alone is
    written in PEFT's layout, unless --merge is given.
    """
    show_activity("verifying the checkpoint")
    from mhmoe_ray.api.run import Run
    from mhmoe_ray.checkpoint.find import split_step
    from mhmoe_ray.runs.directory import find_run

    run, checkpoint = split_step(run, checkpoint)
    run_dir = find_run(run, storage)
    exported = Run(run_dir).export(target_folder, checkpoint, print_note, merge=merge, base=base)
    kind = f"adapter of {exported.base}, " if exported.base else ""
    size = f"{exported.tensors} tensors, {exported.bytes / 1e6:,.1f} MB, model_type {exported.model_type}"
    print_line(f"exported {exported.checkpoint} of {run_dir.id} to {target_folder}: {kind}{size}")


@app.command("import")
def import_(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="Folder of a model in safetensors or of an adapter made by PEFT, hf:ORGANIZATION/NAME of the Hugging "
            "Face hub, a run, whose newest checkpoint is copied, or RUN@STEP.",
        ),
    ],
    name: Annotated[str | None, typer.Option(help="Name of the run; by default the folder's.")] = None,
    storage: options.StorageOption = options.STORAGE,
    seq_len: Annotated[
        int | None, typer.Option(min=2, help="Tokens that prompt and answer may have; by default the model's own.")
    ] = None,
) -> None:
    """Import a model that was trained elsewhere as a run; it can be served and exported, not resumed.

    Its architecture is Llama, Mistral, Qwen2, Qwen3, Mixtral, Qwen3-MoE, OLMoE, or that of a model that `mhmoe ckpt
    export` wrote. An adapter is merged into its base.
    """
    print_note(Activity("importing", source))
    from mhmoe_ray.api.attempts import run_argument
    from mhmoe_ray.api.checkpoints import pick_checkpoint
    from mhmoe_ray.checkpoint.huggingface.hub import PREFIX, local_folder
    from mhmoe_ray.checkpoint.huggingface.import_ import import_checkpoint, import_folder, run_name

    if source.startswith(PREFIX):
        # The folder in the hub's cache is named by a hash, so the run is named after the model and records its id.
        name = name or run_name(source.partition("@")[0].rpartition("/")[2])
        run = import_folder(local_folder(source), name, storage, seq_len, origin=source, on_note=print_note)
    elif (run_and_step := _run_and_step(source, storage)) is not None:
        source_run, step = run_and_step
        path, manifest = pick_checkpoint(source_run, step, verify_hashes=True, on_note=print_note)
        run = import_checkpoint(path, manifest, name or run_name(source_run.id), storage, seq_len)
    else:
        run = import_folder(Path(source), name, storage, seq_len, on_note=print_note)
    print_line(f"imported {source} as run {run.id}; serve it: mhmoe serve deploy {run_argument(run)}")


def _run_and_step(source: str, storage: str) -> "tuple[RunDir, str | None] | None":
    """Return the run that the source of an import names, and the step if it is RUN@STEP; None for a model's folder."""
    from mhmoe_ray.checkpoint.find import split_step
    from mhmoe_ray.errors import CheckpointError, RunError
    from mhmoe_ray.runs.directory import RunDir, find_run, report_read_errors

    folder = Path(source)
    with report_read_errors(folder):
        if folder.exists() and not RunDir(folder.absolute()).attempts_file.is_file():
            return None
    try:
        name, step = split_step(source)
        return find_run(name, storage), step
    except RunError as e:
        reason = f"there is no such folder, and as a run: {e.reason}"
        raise CheckpointError(f"model {source}", reason, "name a folder, a run, or hf:ORGANIZATION/NAME") from e
