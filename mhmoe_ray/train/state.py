"""The tensors of a checkpoint: weights under the model's names, AdamW's moments under the same names, apart."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from mhmoe_ray.runs.layout import RunDir
from mhmoe_ray.runs.manifest import FileEntry, Manifest, checkpoint_name, commit, describe_file
from mhmoe_ray.runs.tensors import load_tensors, save_tensors
from mhmoe_ray.train.gradients import expert_parameters
from mhmoe_ray.train.step import Trainer

MOMENTS = ("exp_avg", "exp_avg_sq")


def save_checkpoint(run: RunDir, trainer: Trainer, group: int) -> Path:
    """Write a checkpoint of the trainer's step and commit it. Collective.

    Every rank writes its own file in each folder; then sizes and hashes are gathered, and rank 0 writes the manifest.
    """
    spec, mesh = trainer.spec, trainer.mesh
    checkpoint = run.checkpoints / checkpoint_name(trainer.step, group)
    save_tensors(checkpoint / "weights", _weights(trainer))
    save_tensors(checkpoint / "optim", _moments(trainer))
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
    """Weights, moments, step and tokens of a checkpoint written at any world size. Collective."""
    for parameter in trainer.model.parameters():
        trainer.optimizer.state[parameter] = {
            "step": torch.tensor(float(manifest.step), device=parameter.device),
            **{moment: torch.zeros_like(parameter) for moment in MOMENTS},
        }
    load_tensors(checkpoint / "weights", _weights(trainer))
    load_tensors(checkpoint / "optim", _moments(trainer))
    trainer.step, trainer.tokens = manifest.step, manifest.tokens


def _weights(trainer: Trainer) -> dict[str, Tensor]:
    return _as_global(trainer, trainer.model.tensors())


def _moments(trainer: Trainer) -> dict[str, Tensor]:
    state, named = trainer.optimizer.state, list(trainer.model.named_parameters())
    by_moment = [_as_global(trainer, {name: state[p][moment] for name, p in named}) for moment in MOMENTS]
    return {
        f"{moment}.{name}": t for moment, tensors in zip(MOMENTS, by_moment, strict=True) for name, t in tensors.items()
    }


def _as_global(trainer: Trainer, local: dict[str, Tensor]) -> dict[str, Tensor]:
    """Experts as views of the global [E, ...]; views, not copies, so that loading fills the tensors themselves."""
    experts = expert_parameters(trainer.model)
    return {name: trainer.mesh.expert_dtensor(t) if name in experts else t for name, t in local.items()}
