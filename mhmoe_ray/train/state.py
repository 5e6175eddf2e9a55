"""The tensors of a checkpoint: weights under the model's names, AdamW's moments under the same names, apart."""

from pathlib import Path

import torch.distributed as dist

from mhmoe_ray.runs.layout import RunDir
from mhmoe_ray.runs.manifest import FileEntry, Manifest, checkpoint_name, commit, describe_file
from mhmoe_ray.runs.tensors import load_tensors, save_tensors
from mhmoe_ray.train.step import Trainer


def save_checkpoint(run: RunDir, trainer: Trainer, group: int) -> Path:
    """Write a checkpoint of the trainer's step and commit it. Collective.

    Every rank writes its own file in each folder; then sizes and hashes are gathered, and rank 0 writes the manifest.
    """
    spec, mesh = trainer.spec, trainer.mesh
    checkpoint = run.checkpoints / checkpoint_name(trainer.step, group)
    save_tensors(checkpoint / "weights", trainer.strategy.weights())
    save_tensors(checkpoint / "optim", trainer.strategy.moments())
    # torch names files by rank, so each rank describes its own.
    mine = {
        str(p.relative_to(checkpoint)): describe_file(p)
        for p in checkpoint.glob(f"*/shard-{mesh.rank + 1:05d}-*.safetensors")
    }
    every: list[dict[str, FileEntry]] = [mine]
    if dist.is_initialized():
        every = [{} for _ in range(mesh.world)]
        dist.all_gather_object(every, mine)
    if mesh.rank == 0:
        manifest = Manifest(
            step=trainer.step,
            tokens=trainer.tokens,
            position=trainer.step * spec.samples_per_step,
            seed=spec.seed,
            world=mesh.world,
            ep=mesh.ep,
            model=spec.model,
            seq_len=spec.data.seq_len,
            data_sha256=describe_file(spec.data.prepared / "manifest.json").sha256,
            tokenizer_sha256=describe_file(run.tokenizer_file).sha256,
            files={name: entry for files in every for name, entry in files.items()},
        )
        commit(checkpoint, manifest)
    if dist.is_initialized():
        dist.barrier()  # nobody goes on, and perhaps ends, before it is committed
    return checkpoint


def restore(trainer: Trainer, checkpoint: Path, manifest: Manifest) -> None:
    """Weights, moments, step and tokens of a checkpoint written at any world size and by any strategy. Collective."""
    strategy = trainer.strategy
    strategy.begin_at(manifest.step)
    weights, moments = strategy.weights(), strategy.moments()
    load_tensors(checkpoint / "weights", weights)
    load_tensors(checkpoint / "optim", moments)
    strategy.loaded(weights, moments)
    trainer.step, trainer.tokens = manifest.step, manifest.tokens
