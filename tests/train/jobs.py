"""Functions that the ranks of the training tests run; they return plain tensors and numbers."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from mhmoe_ray.checkpoint.load import restore
from mhmoe_ray.checkpoint.manifest import read_manifest
from mhmoe_ray.checkpoint.save import Saver
from mhmoe_ray.data.tokenizer import Boundaries
from mhmoe_ray.distributed.mesh import build_mesh
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.train.objectives import MicroBatch
from mhmoe_ray.train.step import Trainer

# This token begins a document. It is also the padding, as with our tokenizers.
START_TOKEN = 0


def build_trainer(spec: RunSpec, nodes: list[str] | None = None) -> Trainer:
    """Return the trainer of this rank on the CPU; `nodes` has the node of each rank, by default one node for all."""
    mesh = build_mesh(spec.cluster, nodes or ["node"] * spec.cluster.workers.max, "cpu")
    inputs = Boundaries(START_TOKEN, frozenset()) if spec.model.family.predicts_next_token else None
    return Trainer(spec, mesh, torch.device("cpu"), inputs)


def rank_batches(spec: RunSpec, step: int, trainer: Trainer) -> list[MicroBatch]:
    """Return this rank's micro-batches of a step."""
    return micro_batches(spec, step)[trainer.mesh.rank :: trainer.mesh.world_size]


def micro_batches(spec: RunSpec, step: int) -> list[MicroBatch]:
    """Return all micro-batches of a step.

    Tokens depend on the step only, and each token determines the next one. Best-fit packing has documents and padding
    of all lengths: the first micro-batch has only padding, and the second has a single target.
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
        token_MBT = token_MBT.where(~starts_MBT, START_TOKEN)
        token_MBT[..., 1:] *= counts_MBT
    return [MicroBatch(token, counts) for token, counts in zip(token_MBT, counts_MBT, strict=True)]


def full_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gather and return each tensor in full, with experts in the order of global ids; a collective operation."""
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for name, t in tensors.items()}


def full_gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Return the full gradients of a step, between `accumulate` and `update`. This is a collective operation."""
    parameters = dict(trainer.model.named_parameters())
    if trainer.strategy.gathers_state:
        from deepspeed.utils import safe_get_full_grad

        rank_gradients = {name: safe_get_full_grad(p) for name, p in parameters.items()}
    else:
        rank_gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in parameters.items()}
    return full_tensors(trainer.strategy._to_global(rank_gradients))


def validation_samples(spec: RunSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Return validation samples that do not divide evenly over ranks; some of their targets do not count."""
    g = torch.Generator().manual_seed(0)
    token_NT = torch.randint(300, (7, spec.data.seq_len + 1), generator=g)
    return token_NT, torch.rand(token_NT[:, 1:].shape, generator=g) < 0.8


def train_and_collect(spec: RunSpec, steps: int, nodes: list[str] | None = None) -> dict[str, Any]:
    """Train `steps` steps from step 0, and return what tests compare between runs, by name.

    The gradients are those of the first step before clipping. Each step has a loss, the mean over all ranks, and a
    gradient norm. The full weights and moments, the number of tokens and a validation are those after the last step.
    """
    trainer = build_trainer(spec, nodes)
    losses, norms, first_gradients = [], [], {}
    for step in range(steps):
        sums = trainer.accumulate(rank_batches(spec, step, trainer))
        if step == 0:
            first_gradients = full_gradients(trainer)
        norms.append(trainer.update(sums).norm)
        total = torch.tensor(sums.loss, dtype=torch.float64)
        if trainer.mesh.world_size > 1:
            dist.all_reduce(total)
        losses.append(float(total) / sums.targets)
    return {
        "gradients": first_gradients,
        "losses": losses,
        "norms": norms,
        "weights": full_tensors(trainer.strategy.checkpoint_weights()),
        "moments": full_tensors(trainer.strategy.checkpoint_moments()),
        "tokens": trainer.tokens,
        "validation": trainer.objective.validate_part(MicroBatch(*validation_samples(spec))),
    }


def train_and_save(spec: RunSpec, run: Path, steps: int, nodes: list[str] | None = None) -> None:
    """Train from step 0, and save a checkpoint in the run directory `run`."""
    trainer = build_trainer(spec, nodes)
    train(spec, trainer, steps)
    save_checkpoint(RunDir(run), trainer)


def continue_and_save(spec: RunSpec, run: Path, checkpoint: Path, steps: int) -> None:
    """Train `steps` further steps from a checkpoint, and save another one in the run directory `run`."""
    trainer = build_trainer(spec)
    restore(trainer, checkpoint, read_manifest(checkpoint))
    train(spec, trainer, steps)
    save_checkpoint(RunDir(run), trainer)


def train(spec: RunSpec, trainer: Trainer, steps: int) -> None:
    """Train the next `steps` steps."""
    for step in range(trainer.step, trainer.step + steps):
        sums = trainer.accumulate(rank_batches(spec, step, trainer))
        trainer.update(sums)


def save_checkpoint(run: RunDir, trainer: Trainer) -> None:
    """Save a checkpoint of the trainer's step, and wait until it is written."""
    saver = Saver(run, trainer, group=1)
    saver.save(trainer.zero_counts())
    saver.wait()


def load_and_describe(spec: RunSpec, checkpoint: Path, steps: int = 0) -> dict[str, Any]:
    """Load a checkpoint at this world size, train `steps` further steps, and return their losses.

    Also return the state before these steps: step, tokens, and full weights and moments.
    """
    trainer = build_trainer(spec)
    restore(trainer, checkpoint, read_manifest(checkpoint))
    result: dict[str, Any] = {"step": trainer.step, "tokens": trainer.tokens}
    result["weights"] = full_tensors(trainer.strategy.checkpoint_weights())
    result["moments"] = full_tensors(trainer.strategy.checkpoint_moments())
    result["losses"] = [_train_step(spec, step, trainer) for step in range(trainer.step, trainer.step + steps)]
    return result


def _train_step(spec: RunSpec, step: int, trainer: Trainer) -> float:
    """Train one step, and return its mean loss over all ranks."""
    sums = trainer.accumulate(rank_batches(spec, step, trainer))
    trainer.update(sums)
    total = torch.tensor(sums.loss, dtype=torch.float64)
    if trainer.mesh.world_size > 1:
        dist.all_reduce(total)
    return float(total) / sums.targets


def validation_loss(spec: RunSpec, token_NT: torch.Tensor, counts_NT: torch.Tensor) -> tuple[float, int]:
    """Return the validation loss of initial weights, and the number of targets that count."""
    return build_trainer(spec).objective.validate_part(MicroBatch(token_NT, counts_NT))


def train_without_rows(spec: RunSpec) -> dict[str, Any]:
    """Train a step in which rank 1's experts get all rows; return the routes per layer and expert, and the weights.

    The experts of rank 0 get no rows.
    """
    trainer = build_trainer(spec)
    with torch.no_grad():
        for layer in trainer.model.moe_layers():
            layer.router.scores.weight_ED.zero_()
            # The scores of experts 2 and 3 have to be higher, because with equal scores topk would choose by order.
            # With weights of 0, each row is the head's bias of 1, so the router's weights of 1 raise those two scores.
            layer.head.bias.fill_(1.0)
            layer.head.weight.zero_()
            layer.router.scores.weight_ED[2:] = 1.0
    sums = trainer.accumulate(rank_batches(spec, 0, trainer))
    trainer.update(sums)
    return {"counts": sums.count_LE, "weights": [p.detach().clone() for p in trainer.model.parameters()]}
