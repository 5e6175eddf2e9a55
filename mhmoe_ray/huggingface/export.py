"""A run's checkpoint to a folder that other tools read."""

import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mhmoe_ray.data.tokenizer import boundaries, load_tokenizer
from mhmoe_ray.errors import CheckpointError
from mhmoe_ray.huggingface.config import CONFIG, to_config
from mhmoe_ray.huggingface.files import INDEX, write_files
from mhmoe_ray.huggingface.names import Entry, entries
from mhmoe_ray.location import Location
from mhmoe_ray.runs.files import copy_file, write_json
from mhmoe_ray.runs.layout import CHAT_TEMPLATE
from mhmoe_ray.runs.manifest import Manifest, run_tokenizer
from mhmoe_ray.runs.tensors import load_tensors, stored_dtypes


class Exported(NamedTuple):
    model_type: str
    tensors: int
    bytes: int


def export(checkpoint: Location, manifest: Manifest, to: Path) -> Exported:
    """Write safetensors with their index, config.json, tokenizer.json and chat_template.jinja, if the run has one; one
    layer at a time is in memory.

    Args:
        checkpoint: inside its run directory, already checked.
        manifest: of it.
        to: a folder that does not exist or is empty. It appears under this name when it is whole.

    Raises:
        CheckpointError: the folder cannot be written, or the checkpoint's tokenizer is gone or another one.
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


def _write(folder: Path, checkpoint: Location, manifest: Manifest, tokenizer: Location) -> Exported:
    groups, dtypes = entries(manifest.model), stored_dtypes(checkpoint / "weights")
    names = write_files(folder, _exported(checkpoint / "weights", groups, dtypes), len(groups))
    copy_file(tokenizer, folder / "tokenizer.json")
    if (template := tokenizer.parent / CHAT_TEMPLATE).exists():
        copy_file(template, folder / CHAT_TEMPLATE)
    edges = boundaries(load_tokenizer(tokenizer, manifest.model.vocab_size))
    main = dtypes["embedding.weight"]
    config = to_config(
        manifest.model, manifest.seq_len, main, (edges.start, sorted(edges.ends)), manifest.tokenizer_sha256
    )
    write_json(folder / CONFIG, config)
    total = sum(dtypes[e.ours].itemsize * torch.Size(e.shape).numel() for group in groups for e in group)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))})
    return Exported(config["model_type"], len(names), total)


def _exported(
    weights: Location, groups: list[list[Entry]], dtypes: dict[str, torch.dtype]
) -> Iterator[dict[str, Tensor]]:
    for group in groups:
        # A tensor that is not there has no dtype; loading says so.
        ours = {e.ours: torch.empty(e.shape, dtype=dtypes.get(e.ours)) for e in group}
        load_tensors(weights, ours)
        yield {name: part for e in group for name, part in e.split(ours.pop(e.ours)).items()}
