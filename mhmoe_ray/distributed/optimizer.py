"""Construction of the AdamW optimizer, whose learning rate `TrainSpec.learning_rate` computes."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mhmoe_ray.distributed.rounded_adamw import RoundedAdamW, ValuePosition
from mhmoe_ray.model.feedforward import Experts, matrix_names
from mhmoe_ray.model.trunk import Trunk
from mhmoe_ray.spec import TrainSpec

# torch keeps its compiler away from an optimizer. For that it imports the compiler, which takes more than a second of
# the time to the first step. Here only blocks of a model are compiled, so these two methods need no marks, and `AdamW`
# has torch's update without its decorator.
for _method in (torch.optim.Optimizer.add_param_group, torch.optim.Optimizer.zero_grad):
    _function = inspect.unwrap(_method)
    setattr(_function, "__dynamo_disable", _function)


class AdamW(torch.optim.AdamW):
    """AdamW as torch has it, which does not import torch's compiler."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def expert_parameters(model: Trunk) -> dict[str, nn.Parameter]:
    """Return the parameters of this process's routed experts, by name."""
    return {
        f"{module_name}.{name}": parameter
        for module_name, module in model.named_modules()
        if isinstance(module, Experts)
        for name, parameter in module.named_parameters()
    }


def build_optimizer(
    model: Trunk, spec: TrainSpec, seed: int = 0, positions: Mapping[nn.Parameter, ValuePosition] | None = None
) -> torch.optim.AdamW:
    """Return an AdamW optimizer in which only matrices have weight decay. Moments in bfloat16 need the `positions` of
    this rank's values, and `seed` for stochastic rounding."""
    # Experts have parameter groups of their own, because they may be sharded differently: they may be full tensors
    # where other parameters are sharded, or be sharded over fewer ranks.
    expert_names, decayed_names = set(expert_parameters(model)), matrix_names(model)
    parameters_by_kind: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.trained_parameters().items():
        parameters_by_kind.setdefault((name in expert_names, name in decayed_names), []).append(parameter)
    groups = [
        {
            "params": p,
            "weight_decay": spec.weight_decay * has_decay,
            "lr_ratio": spec.expert_lr_ratio if is_expert else 1.0,
        }
        for (is_expert, has_decay), p in parameters_by_kind.items()
    ]
    options: dict[str, Any] = {"lr": spec.lr, "betas": spec.betas, "eps": spec.eps, "fused": True}
    if spec.moment_precision == "bfloat16":
        assert positions is not None
        return RoundedAdamW(groups, positions, seed, **options)
    return AdamW(groups, **options)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all parameter groups of an optimizer, multiplied by the ratio of each."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)
