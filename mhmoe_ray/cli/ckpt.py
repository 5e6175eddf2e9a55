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
    facts,
    in_bytes,
    note,
    out,
    pick_checkpoint,
    print_json,
)
from mhmoe_ray.cli.verbs import Verbs

app = typer.Typer(cls=Verbs, help="Inspect, verify, export and import checkpoints.", no_args_is_help=True)


@app.command()
def inspect(
    run: RunArg = None,
    checkpoint: CheckpointOption = None,
    storage: StorageOption = STORAGE,
    json: JsonOption = False,
) -> None:
    """Show what a checkpoint holds: its position in training and in the data, who wrote it, and its files."""
    from mhmoe_ray.checkpoint.manifest import PARTS
    from mhmoe_ray.planner.sizes import sizes
    from mhmoe_ray.runs.directory import find_run

    found = find_run(run, storage)
    path, manifest = pick_checkpoint(found, checkpoint, hashed=False)
    if json:
        print_json({"run": found.id, "name": path.name, "path": str(path), **manifest.model_dump(mode="json")})
        return
    parts = {p: [f.size for name, f in manifest.files.items() if name.startswith(f"{p}/")] for p in PARTS}
    moe, size = manifest.model.moe, sizes(manifest.model)
    experts = f", {moe.experts} experts in each of {manifest.model.moe_layers} layers" if moe else ""
    rows: dict[str, str | None] = {
        "step": f"{manifest.step:,}",
        "tokens": f"{manifest.tokens:,}",
        "goes on at sample": f"{manifest.position:,}",
        "written by": f"{manifest.world} workers, ep {manifest.ep}; any other number may read it",
        "model": f"{size.parameters:,} parameters{experts}",
        **{part: f"{in_bytes(sum(found))} in {len(found)} files" for part, found in parts.items() if found},
        "path": str(path),
    }
    out.print(facts(rows, f"{path.name} of {found.id}"))


@app.command()
def verify(run: RunArg = None, storage: StorageOption = STORAGE, json: JsonOption = False) -> None:
    """Read all of a run's checkpoints and compare names, sizes and hashes of their files with their manifests.

    Exit code 8 if one is damaged. A checkpoint without a manifest was never finished and does not count as damaged; nor
    does one that keep_checkpoints has removed meanwhile.
    """
    from mhmoe_ray.checkpoint.manifest import committed, is_committed, read_manifest, unfinished
    from mhmoe_ray.errors import CheckpointError
    from mhmoe_ray.runs.directory import find_run

    found = find_run(run, storage)
    problems: dict[str, str | None] = {}
    dropped: list[str] = []
    for path in committed(found):
        try:
            read_manifest(path)
        except CheckpointError as error:
            if is_committed(path):
                problems[path.name] = error.why
            else:
                dropped.append(path.name)
        else:
            problems[path.name] = None
    never_done = [path.name for path in unfinished(found) if path.name not in dropped]
    damaged = [name for name, why in problems.items() if why]
    if json:
        checkpoints = [{"name": name, "whole": not why, "why": why} for name, why in problems.items()]
        print_json({"run": found.id, "checkpoints": checkpoints, "dropped": dropped, "unfinished": never_done})
    else:
        states: dict[str, str | None] = {name: why or "whole" for name, why in problems.items()}
        states |= dict.fromkeys(dropped, "dropped meanwhile") | dict.fromkeys(never_done, "unfinished")
        out.print(facts(states, found.id))
    if damaged:
        raise CheckpointError(
            f"run {found.id}", f"{len(damaged)} of {len(problems)} checkpoints are damaged", "resume skips them"
        )


@app.command()
def export(
    to: Annotated[Path, typer.Option(help="Folder to write; it must not exist, or be empty.")],
    run: RunArg = None,
    checkpoint: CheckpointOption = None,
    storage: StorageOption = STORAGE,
) -> None:
    """Write a run's checkpoint in Hugging Face's layout: safetensors by expert, their index, config.json and tokenizer.

    A model of exactly Mixtral's shape loads in transformers as it is.
    """
    from mhmoe_ray.checkpoint.huggingface import export as exporting
    from mhmoe_ray.runs.directory import find_run

    found = find_run(run, storage)
    path, manifest = pick_checkpoint(found, checkpoint, hashed=True)
    note.print(f"exporting {path.name} of {found.id}")
    done = exporting.export(path, manifest, to)
    size = f"{done.tensors} tensors, {done.bytes / 1e6:,.1f} MB, model_type {done.model_type}"
    out.print(f"exported {path.name} of {found.id} to {to}: {size}", soft_wrap=True)


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
    from mhmoe_ray.cli.jobs import name_of

    note.print(f"importing {source}", soft_wrap=True)
    run = import_folder(source, name, storage, seq_len)
    out.print(f"imported {source} as run {run.id}; serve it: mhmoe serve deploy {name_of(run)}", soft_wrap=True)
