"""AdamW and its learning-rate schedule."""

import torch
from torch import nn

from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.model.feedforward import Experts, matrices
from mhmoe_ray.spec import TrainSpec


def expert_parameters(model: Decoder) -> dict[str, nn.Parameter]:
    """Return, by name, the parameters that expert parallelism spreads over ranks."""
    return {
        f"{module_name}.{name}": parameter
        for module_name, module in model.named_modules()
        if isinstance(module, Experts)
        for name, parameter in module.named_parameters()
    }


def build_optimizer(model: Decoder, spec: TrainSpec) -> torch.optim.AdamW:
    """Build AdamW with weight decay for matrices, those of experts included, and without it for norms and biases.

    Experts have parameter groups of their own, because they are spread over ranks in another way: as whole tensors
    where others are sharded, or as shards over fewer ranks.
    """
    experts, decays = set(expert_parameters(model)), matrices(model)
    kinds: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        kinds.setdefault((name in experts, name in decays), []).append(parameter)
    groups = [{"params": p, "weight_decay": spec.weight_decay * decay} for (_, decay), p in kinds.items()]
    return torch.optim.AdamW(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps, fused=True)


def learning_rate(spec: TrainSpec, step: int) -> float:
    """Return the learning rate of the update that ends step `step` (from 1): linear warm-up, then linear decay to
    min_lr at the last step."""
    if step <= spec.warmup_steps:
        return spec.lr * step / spec.warmup_steps
    progress = (step - spec.warmup_steps) / max(1, spec.steps - spec.warmup_steps)
    return spec.lr + (spec.min_lr - spec.lr) * min(1.0, progress)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
