"""Checkpoint files and manifests for tests of the code that reads them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from mhmoe_ray.checkpoint.format import local_slice
from mhmoe_ray.checkpoint.manifest import CheckpointManifest, commit
from mhmoe_ray.checkpoint.save import WriterAssignment, save_slices
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.spec import ModelSpec
from mhmoe_ray.storage import describe_file


def save_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the slices of `tensors` that are assigned to this rank into one file in `folder`.

    All ranks have to call it, with the same tensors in the same order. A single process writes all tensors.
    """
    shares, rank = WriterAssignment(), dist.get_rank() if dist.is_initialized() else 0
    save_slices(folder, {name: local_slice(t) for name, t in tensors.items() if shares.is_writer(t)}, rank)


def commit_checkpoint(checkpoint: Path, model: ModelSpec, **fields: Any) -> None:
    """Complete a checkpoint in its run directory by writing the manifest of the files in it.

    Args:
        checkpoint: the checkpoint.
        model: spec of the model.
        fields: fields of the manifest that differ from those of a checkpoint of step 1.
    """
    run = RunDir.of_checkpoint(checkpoint)
    run_files = {"tokenizer_sha256": run.tokenizer_file, "classes_sha256": run.classes_file}
    values = {
        "step": 1,
        "tokens": 64,
        "position": 1,
        "seed": 7,
        "world": 1,
        "ep": 1,
        "seq_len": 64,
        "data_sha256": "",
        "files": {str(p.relative_to(checkpoint)): describe_file(p) for p in checkpoint.glob("*/*")},
        **{name: describe_file(file).sha256 if file.exists() else None for name, file in run_files.items()},
        **fields,
    }
    commit(checkpoint, CheckpointManifest(model=model, **values))


def write_checkpoint(run, step, group=1):
    """Write a committed checkpoint with one weights file of `step` bytes, and return its folder."""
    checkpoint = run.checkpoints / f"step_{step:08d}.{group}"
    (checkpoint / "weights").mkdir(parents=True)
    (checkpoint / "weights" / "w.safetensors").write_bytes(b"w" * step)
    commit_checkpoint(checkpoint, run.spec().model, step=step, tokens=1, seed=0, seq_len=16, tokenizer_sha256="")
    return checkpoint
