"""AdamW and its learning-rate schedule."""

import torch

from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.spec import TrainSpec


def build_optimizer(model: Decoder, spec: TrainSpec) -> torch.optim.AdamW:
    """Weight decay for matrices and experts; none for norms and biases."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": spec.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps, fused=True)


def learning_rate(spec: TrainSpec, step: int) -> float:
    """For the update that ends step `step` (from 1): linear warm-up, then linear decay to min_lr at the last step."""
    if step <= spec.warmup_steps:
        return spec.lr * step / spec.warmup_steps
    progress = (step - spec.warmup_steps) / max(1, spec.steps - spec.warmup_steps)
    return spec.lr + (spec.min_lr - spec.lr) * min(1.0, progress)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
