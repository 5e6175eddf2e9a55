"""AdamW. `TrainSpec.learning_rate` computes its learning rate."""

import torch
from torch import nn

from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.model.feedforward import Experts, matrix_names
from mhmoe_ray.spec import TrainSpec


def expert_parameters(model: Decoder) -> dict[str, nn.Parameter]:
    """Return the parameters of the routed experts that this process holds, by their name in the model."""
    return {
        f"{module_name}.{name}": parameter
        for module_name, module in model.named_modules()
        if isinstance(module, Experts)
        for name, parameter in module.named_parameters()
    }


def build_optimizer(model: Decoder, spec: TrainSpec) -> torch.optim.AdamW:
    """Return AdamW for all parameters, with weight decay of matrices, including those of experts, but not of norms and
    biases."""
    # Experts have parameter groups of their own, because they may be sharded differently: they may be full tensors
    # where other parameters are sharded, or be sharded over fewer ranks.
    expert_names, decayed_names = set(expert_parameters(model)), matrix_names(model)
    parameters_by_kind: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        parameters_by_kind.setdefault((name in expert_names, name in decayed_names), []).append(parameter)
    groups = [
        {"params": p, "weight_decay": spec.weight_decay * has_decay} for (_, has_decay), p in parameters_by_kind.items()
    ]
    return torch.optim.AdamW(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr
