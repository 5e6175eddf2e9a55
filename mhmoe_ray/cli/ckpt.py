"""`mhmoe ckpt`: show, verify, export and import checkpoints."""

from pathlib import Path
from typing import Annotated

import typer

from mhmoe_ray.cli.common import (
    STORAGE,
    CheckpointOption,
    JsonOption,
    RunArg,
    StorageOption,
    fact_table,
    format_bytes,
    note,
    out,
    pick_checkpoint,
    print_json,
)
from mhmoe_ray.cli.verbs import SuggestingGroup

app = typer.Typer(cls=SuggestingGroup, help="Inspect, verify, export and import checkpoints.", no_args_is_help=True)


@app.command()
def inspect(
    run: RunArg = None,
    checkpoint: CheckpointOption = None,
    storage: StorageOption = STORAGE,
    json: JsonOption = False,
) -> None:
    """Show a checkpoint: its position in training and in the data, the workers that wrote it, and its files."""
    from mhmoe_ray.checkpoint.manifest import PARTS
    from mhmoe_ray.planner.sizes import compute_sizes
    from mhmoe_ray.runs.directory import find_run

    run_dir = find_run(run, storage)
    # Only the manifest is shown, so nothing is hashed.
    path, manifest = pick_checkpoint(run_dir, checkpoint, verify_hashes=False)
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
        "written by": f"{manifest.world} workers, ep {manifest.ep}; any other number may read it",
        "model": f"{size.parameters:,} parameters{experts}",
        **{
            part: f"{format_bytes(sum(file_sizes))} in {len(file_sizes)} files"
            for part, file_sizes in parts.items()
            if file_sizes
        },
        "path": str(path),
    }
    out.print(fact_table(rows, f"{path.name} of {run_dir.id}"))


@app.command()
def verify(run: RunArg = None, storage: StorageOption = STORAGE, json: JsonOption = False) -> None:
    """Read all of a run's checkpoints and compare names, sizes and hashes of their files with their manifests.

    The exit code is 8 if one is damaged. A checkpoint without a manifest was never finished and does not count as
    damaged; a checkpoint that keep_checkpoints has removed meanwhile does not count either.
    """
    from mhmoe_ray.checkpoint.manifest import (
        committed_checkpoints,
        is_committed,
        read_manifest,
        uncommitted_checkpoints,
    )
    from mhmoe_ray.errors import CheckpointError
    from mhmoe_ray.runs.directory import find_run

    run_dir = find_run(run, storage)
    problems: dict[str, str | None] = {}
    dropped_names: list[str] = []
    for path in committed_checkpoints(run_dir):
        try:
            read_manifest(path)
        except CheckpointError as error:
            # A run may remove a checkpoint between the listing and the reading.
            if is_committed(path):
                problems[path.name] = error.reason
            else:
                dropped_names.append(path.name)
        else:
            problems[path.name] = None
    # A checkpoint loses its manifest first, so one whose removal goes on looks unfinished.
    unfinished_names = [path.name for path in uncommitted_checkpoints(run_dir) if path.name not in dropped_names]
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
    # The table is on stdout already; the error gives the exit code.
    if damaged:
        raise CheckpointError(
            f"run {run_dir.id}", f"{len(damaged)} of {len(problems)} checkpoints are damaged", "resume skips them"
        )


@app.command()
def export(
    target_folder: Annotated[Path, typer.Option("--to", help="Folder to write; it must not exist, or be empty.")],
    run: RunArg = None,
    checkpoint: CheckpointOption = None,
    storage: StorageOption = STORAGE,
) -> None:
    """Write a run's checkpoint in Hugging Face's layout: safetensors by expert, their index, config.json and tokenizer.

    A model of exactly Mixtral's shape loads in transformers as it is.
    """
    from mhmoe_ray.checkpoint.huggingface import export as huggingface_export
    from mhmoe_ray.runs.directory import find_run

    run_dir = find_run(run, storage)
    # A damaged checkpoint must not be exported, so all of its weights are hashed first.
    path, manifest = pick_checkpoint(run_dir, checkpoint, verify_hashes=True)
    note.print(f"exporting {path.name} of {run_dir.id}")
    exported = huggingface_export.export(path, manifest, target_folder)
    size = f"{exported.tensors} tensors, {exported.bytes / 1e6:,.1f} MB, model_type {exported.model_type}"
    out.print(f"exported {path.name} of {run_dir.id} to {target_folder}: {size}", soft_wrap=True)


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of an export, or of a Mixtral in safetensors.")],
    name: Annotated[str | None, typer.Option(help="Name of the run; by default the folder's.")] = None,
    storage: StorageOption = STORAGE,
    seq_len: Annotated[
        int | None, typer.Option(min=2, help="Tokens that prompt and answer may have; by default the model's own.")
    ] = None,
) -> None:
    """Import a model that was trained elsewhere as a run; it can be served and exported, not resumed."""
    from mhmoe_ray.checkpoint.huggingface.import_ import import_folder
    from mhmoe_ray.cli.jobs import run_argument

    note.print(f"importing {source}", soft_wrap=True)
    run = import_folder(source, name, storage, seq_len)
    out.print(f"imported {source} as run {run.id}; serve it: mhmoe serve deploy {run_argument(run)}", soft_wrap=True)
