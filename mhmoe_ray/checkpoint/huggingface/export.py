"""Export a run's checkpoint to a folder that other tools read."""

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mhmoe_ray.checkpoint.format import Index
from mhmoe_ray.checkpoint.huggingface.config import CONFIG, to_config
from mhmoe_ray.checkpoint.huggingface.files import INDEX, write_files
from mhmoe_ray.checkpoint.huggingface.names import Entry, entries
from mhmoe_ray.checkpoint.huggingface.tokenizer import (
    TOKENIZER_CONFIG,
    adding_start,
    tokenizer_config,
    tokenizer_identity,
)
from mhmoe_ray.checkpoint.load import index_of, load_tensors
from mhmoe_ray.checkpoint.manifest import Manifest
from mhmoe_ray.checkpoint.tokenizer import run_tokenizer
from mhmoe_ray.data.tokenizer import boundaries, load_tokenizer
from mhmoe_ray.errors import CheckpointError
from mhmoe_ray.runs.directory import CHAT_TEMPLATE
from mhmoe_ray.storage import Location, replace_file, write_json


class Exported(NamedTuple):
    model_type: str
    tensors: int
    bytes: int


def export(checkpoint: Location, manifest: Manifest, to: Path) -> Exported:
    """Write safetensors with their index, config.json, tokenizer.json, tokenizer_config.json and, if the run has one,
    chat_template.jinja.

    One layer at a time is in memory.

    Args:
        checkpoint: checkpoint inside its run directory, already verified.
        manifest: manifest of the checkpoint.
        to: folder that does not exist or is empty. It appears under this name when it is complete.

    Raises:
        CheckpointError: the folder cannot be written, the checkpoint cannot be read, or its tokenizer is missing or
            another one.
    """
    what = f"folder {to}"
    tokenizer = run_tokenizer(checkpoint, manifest)
    partial = to.absolute().with_name(f"{to.name}.partial-{secrets.token_hex(3)}")
    try:
        if to.exists() and any(to.iterdir()):
            raise CheckpointError(what, "it is not empty", "name a folder that does not exist yet")
        partial.mkdir(parents=True)
        try:
            done = _write(partial, checkpoint, manifest, tokenizer)
            partial.rename(to)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as e:
        raise CheckpointError(what, e.strerror or str(e), "name a folder you can write") from e
    return done


@contextmanager
def _reading(checkpoint: Location) -> Iterator[None]:
    """Report an error in the context as one of reading the checkpoint, not of writing the folder.

    Raises:
        CheckpointError: an OSError was raised in the context.
    """
    try:
        yield
    except OSError as e:
        why = f"it cannot be read: {e.strerror or e}"
        raise CheckpointError(f"checkpoint {checkpoint}", why, "mend its storage, or use another one") from e


def _write(folder: Path, checkpoint: Location, manifest: Manifest, tokenizer: Location) -> Exported:
    groups = entries(manifest.model)
    with _reading(checkpoint):
        index = index_of(checkpoint / "weights")
        template = tokenizer.parent / CHAT_TEMPLATE
        texts = {file.name: file.read_bytes() for file in (tokenizer, template) if file == tokenizer or file.exists()}
    dtypes = {name: slices[0].dtype for name, slices in index.items()}
    names = write_files(folder, _exported(checkpoint, groups, index), len(groups))
    texts[tokenizer.name] = adding_start(texts[tokenizer.name])
    for name, text in texts.items():
        replace_file(folder / name, text)
    write_json(folder / TOKENIZER_CONFIG, tokenizer_config(texts[tokenizer.name], manifest.seq_len))
    edges = boundaries(load_tokenizer(folder / tokenizer.name, manifest.model.vocab_size))
    ends = sorted(edges.ends.union(manifest.ends))
    main = dtypes["embedding.weight"]
    identity = tokenizer_identity(texts[tokenizer.name])
    config = to_config(manifest.model, manifest.seq_len, main, (edges.start, ends), identity)
    write_json(folder / CONFIG, config)
    total = sum(dtypes[e.ours].itemsize * torch.Size(e.shape).numel() for group in groups for e in group)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))})
    return Exported(config["model_type"], len(names), total)


def _exported(checkpoint: Location, groups: list[list[Entry]], index: Index) -> Iterator[dict[str, Tensor]]:
    for group in groups:
        # A tensor that is not there has no dtype; loading says so.
        dtypes = {e.ours: index[e.ours][0].dtype if e.ours in index else None for e in group}
        ours = {e.ours: torch.empty(e.shape, dtype=dtypes[e.ours]) for e in group}
        with _reading(checkpoint):
            load_tensors(checkpoint / "weights", ours, index=index)
        yield {name: part for e in group for name, part in e.split(ours.pop(e.ours)).items()}
