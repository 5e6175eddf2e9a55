"""Functions that the ranks of the training tests run; each returns plain tensors and numbers."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from mhmoe_ray.checkpoint.load import restore
from mhmoe_ray.checkpoint.manifest import read_manifest
from mhmoe_ray.checkpoint.save import Saver
from mhmoe_ray.distributed.mesh import build_mesh
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.train.step import MicroBatch, Trainer

START = 0  # the token that begins a document; as with tokenizers of ours, padding looks the same to a model


def trainer_of(spec: RunSpec, nodes: list[str] | None = None) -> Trainer:
    mesh = build_mesh(spec.cluster, nodes or ["node"] * spec.cluster.workers.max, "cpu")
    return Trainer(spec, mesh, torch.device("cpu"), START)


def batches(spec: RunSpec, step: int, trainer: Trainer) -> list[MicroBatch]:
    """Return this rank's micro-batches of a step."""
    return micro_batches(spec, step)[trainer.mesh.rank :: trainer.mesh.world]


def micro_batches(spec: RunSpec, step: int) -> list[MicroBatch]:
    """Return all micro-batches of a step.

    Tokens depend on the step alone, and each follows from the one before. Best-fit packing gives documents of all
    lengths and padding of all lengths: the first micro-batch has nothing else, and the second has a single target.
    """
    m, b, t = spec.train.micro_batches, spec.train.micro_batch_size, spec.data.seq_len
    g = torch.Generator().manual_seed(1000 + step)
    chain = [torch.randint(40, (m, b), generator=g)]
    for _ in range(t):
        chain.append((chain[-1] * 7 + 3) % 40)
    token_MBT = torch.stack(chain, dim=-1)
    counts_MBT = torch.ones(m, b, t, dtype=torch.bool)
    if spec.data.packing == "best_fit":
        starts_MBT = torch.rand(m, b, t + 1, generator=g) < 0.25
        starts_MBT[..., 0] = True
        targets_MB = torch.randint(t + 1, (m, b), generator=g)
        targets_MB[:2] = 0
        targets_MB[1, 0] = 1
        counts_MBT = torch.arange(t) < targets_MB[..., None]
        token_MBT = token_MBT.where(~starts_MBT, START)
        token_MBT[..., 1:] *= counts_MBT
    return [MicroBatch(token, counts) for token, counts in zip(token_MBT, counts_MBT, strict=True)]


def whole(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return each tensor complete with the parts that other ranks hold, experts by global id. Collective."""
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for name, t in tensors.items()}


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Return the whole gradients of a step, between `accumulate` and `update`. Collective."""
    named = dict(trainer.model.named_parameters())
    if trainer.strategy.gathers:
        from deepspeed.utils import safe_get_full_grad

        found = {name: safe_get_full_grad(p) for name, p in named.items()}
    else:
        found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named.items()}
    return whole(trainer.strategy._as_global(found))


def held_out(spec: RunSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Return validation samples that do not divide evenly over ranks, some of whose targets do not count."""
    g = torch.Generator().manual_seed(0)
    token_NT = torch.randint(300, (7, spec.data.seq_len + 1), generator=g)
    return token_NT, torch.rand(token_NT[:, 1:].shape, generator=g) < 0.8


def gradients_then_losses(spec: RunSpec, steps: int, nodes: list[str] | None = None) -> dict[str, Any]:
    """Return the unclipped gradients of the first step, the loss of each step, and the state after the last one.

    The state is weights, moments, tokens and validation.
    """
    trainer = trainer_of(spec, nodes)
    losses, norms, first = [], [], {}
    for step in range(steps):
        sums = trainer.accumulate(batches(spec, step, trainer))
        if step == 0:
            first = gradients(trainer)
        norms.append(trainer.update(sums).norm)
        total = torch.tensor(sums.loss, dtype=torch.float64)
        if trainer.mesh.world > 1:
            dist.all_reduce(total)
        losses.append(float(total) / sums.targets)
    return {
        "gradients": first,
        "losses": losses,
        "norms": norms,
        "weights": whole(trainer.strategy.weights()),
        "moments": whole(trainer.strategy.moments()),
        "tokens": trainer.tokens,
        "validation": trainer.validate(*held_out(spec)),
    }


def train_and_save(spec: RunSpec, run: Path, steps: int, nodes: list[str] | None = None) -> None:
    trainer = trainer_of(spec, nodes)
    train(spec, trainer, steps)
    save(RunDir(run), trainer)


def train(spec: RunSpec, trainer: Trainer, steps: int) -> None:
    for step in range(trainer.step, trainer.step + steps):
        sums = trainer.accumulate(batches(spec, step, trainer))
        trainer.update(sums)


def save(run: RunDir, trainer: Trainer) -> None:
    saver = Saver(run, trainer, group=1)
    saver.save(trainer.zero_counts())
    saver.wait()


def load_and_describe(spec: RunSpec, checkpoint: Path, steps: int = 0) -> dict[str, Any]:
    """Return weights and moments as this world loads them, and the losses of the steps that follow."""
    trainer = trainer_of(spec)
    restore(trainer, checkpoint, read_manifest(checkpoint))
    result: dict[str, Any] = {"step": trainer.step, "tokens": trainer.tokens}
    result["weights"] = whole(trainer.strategy.weights())
    result["moments"] = whole(trainer.strategy.moments())
    result["losses"] = [_step(spec, step, trainer) for step in range(trainer.step, trainer.step + steps)]
    return result


def _step(spec: RunSpec, step: int, trainer: Trainer) -> float:
    """Train one step, and return its mean loss over all ranks."""
    sums = trainer.accumulate(batches(spec, step, trainer))
    trainer.update(sums)
    total = torch.tensor(sums.loss, dtype=torch.float64)
    if trainer.mesh.world > 1:
        dist.all_reduce(total)
    return float(total) / sums.targets


def validation_loss(spec: RunSpec, token_NT: torch.Tensor, counts_NT: torch.Tensor) -> tuple[float, int]:
    return trainer_of(spec).validate(token_NT, counts_NT)


def nothing_to_do(spec: RunSpec) -> dict[str, Any]:
    """Train a step in which a rank has no rows, forward and backward.

    Both ranks send all their rows to the experts of rank 1, so rank 0's experts get nothing.
    """
    trainer = trainer_of(spec)
    with torch.no_grad():
        for layer in trainer.model.moe_layers():
            layer.router.scores.weight_ED.zero_()
            # Equal scores: topk takes whatever comes first, so push experts 2 and 3 up through the head's bias.
            layer.head.bias.fill_(1.0)
            layer.head.weight.zero_()
            layer.router.scores.weight_ED[2:] = 1.0
    sums = trainer.accumulate(batches(spec, 0, trainer))
    trainer.update(sums)
    return {"counts": sums.count_LE, "weights": [p.detach().clone() for p in trainer.model.parameters()]}
