"""`mhmoe ckpt`: checkpoints to and from folders that other tools read and write."""

from pathlib import Path
from typing import Annotated

import typer

from mhmoe_ray.cli.common import STORAGE, CheckpointOption, RunArg, StorageOption, note, out, pick_checkpoint

app = typer.Typer(help="Export and import checkpoints.", no_args_is_help=True)


@app.command()
def export(
    to: Annotated[Path, typer.Option(help="Folder to write; it must not exist, or be empty.")],
    run: RunArg = None,
    checkpoint: CheckpointOption = None,
    storage: StorageOption = STORAGE,
) -> None:
    """Write a run's checkpoint in Hugging Face's layout: safetensors by expert, their index, config.json and tokenizer.

    A model of exactly Mixtral's shape loads in transformers as it lies.
    """
    from mhmoe_ray.exchange import export as exporting
    from mhmoe_ray.runs.layout import find_run

    found = find_run(run, storage)
    path, manifest = pick_checkpoint(found, checkpoint)
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
    """Make a run of a model that was trained elsewhere; it can be served and exported, not resumed."""
    from mhmoe_ray.cli.launch import name_of
    from mhmoe_ray.exchange.import_ import import_folder

    note.print(f"importing {source}", soft_wrap=True)
    run = import_folder(source, name, storage, seq_len)
    out.print(f"imported {source} as run {run.id}; serve it: mhmoe serve deploy {name_of(run)}", soft_wrap=True)
