"""Initial weights, which depend only on the seed, the tensor's name and the expert's global id, not on the ranks."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mhmoe_ray.model.adapter import MARK, is_adapter
from mhmoe_ray.model.architectures import modules_of
from mhmoe_ray.model.feedforward import Experts
from mhmoe_ray.model.held import is_dtensor, local_shard, shard_offset
from mhmoe_ray.model.noise import seeded_generator
from mhmoe_ray.model.router.scores import INITIAL_TEMPERATURE, MIN_TEMPERATURE
from mhmoe_ray.model.trunk import Trunk


@torch.no_grad()
def init_weights(model: Trunk, seed: int, on_tensor: Callable[[], None] = lambda: None) -> None:
    """Set every parameter and buffer of `model` to its initial values, in place; of a DTensor, only this rank's shard.

    | tensor | initial values |
    | --- | --- |
    | embeddings, untied output | normal, sd d^-0.5 |
    | attention | as nn.Linear (torchscale has a Xavier initialization for it that nothing calls) |
    | feed-forward, experts | as nn.Linear; every expert has a seed of its own |
    | head projection | Xavier with gain 1/sqrt 2, bias as nn.Linear |
    | merge projection | Xavier, bias 0 |
    | router | as nn.Linear; X-MoE's expert embeddings orthogonal, gain 0.32 |
    | gain of the rows of router smear | 0.01, as in its authors' code |
    | norms | 1, bias 0 |
    | adapters | A as nn.Linear, B 0 (arXiv 2106.09685) |
    | convolutions of detectors | as nn.Conv2d |
    | factor of the contrastive loss | 1 / 0.07, as in CLIP |
    | linear layers with an `initial_scale` | as nn.Linear, times this factor |

    "As nn.Linear" means that weights and biases are uniform in +-n^-0.5, where n is the fan-in of the matrix. In the
    head projection, n is d for the first layer, and h times the width of a sub-token for later layers; by default both
    are d. The architecture may then change the values (`Modules.rescale_initial`). `on_tensor` is called after each
    parameter.
    """
    # Tensors are drawn one by one: at most one full tensor, or one expert of a stack, is in CPU memory at a time.
    for module_name, module in model.named_modules():
        for name, tensor in module.named_parameters(recurse=False):
            full_name = f"{module_name}.{name}"
            shard, offset = local_shard(tensor), shard_offset(tensor)
            if isinstance(module, Experts):
                first_expert = offset[0] if is_dtensor(tensor) else module.expert_ids.start
                for expert, weight in enumerate(shard, start=first_expert):
                    weight.copy_(_initial_expert(model, module, full_name, weight, expert, seed))
            else:
                full_tensor = _initial_tensor(model, module, full_name, tensor, seed)
                shard.copy_(
                    full_tensor[
                        tuple(slice(start, start + length) for start, length in zip(offset, shard.shape, strict=True))
                    ]
                )
            on_tensor()
        for buffer in module.buffers(recurse=False):
            buffer.zero_()


@torch.no_grad()
def initial_tensor(model: Trunk, name: str, seed: int) -> Tensor:
    """Return the initial values of a parameter or buffer, in CPU memory; the model may be on the meta device."""
    module_name, _, tensor_name = name.rpartition(".")
    module = model.get_submodule(module_name)
    tensor = getattr(module, tensor_name)
    if tensor_name in dict(module.named_buffers(recurse=False)):
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    if isinstance(module, Experts):
        return torch.stack(
            [_initial_expert(model, module, name, tensor[0], expert, seed) for expert in module.expert_ids]
        )
    return _initial_tensor(model, module, name, tensor, seed)


def _initial_expert(model: Trunk, module: Experts, name: str, template: Tensor, expert: int, seed: int) -> Tensor:
    return _initial_values(model, module, name, template, seeded_generator(f"{seed}:{name}.{expert}"))


def _initial_tensor(model: Trunk, module: nn.Module, name: str, template: Tensor, seed: int) -> Tensor:
    return _initial_values(model, module, name, template, seeded_generator(f"{seed}:{name}"))


def _initial_values(model: Trunk, module: nn.Module, name: str, template: Tensor, generator: torch.Generator) -> Tensor:
    t = torch.empty(template.shape, dtype=template.dtype)
    _fill_initial_values(module, name, t, generator)
    t *= getattr(module, "initial_scale", 1)
    return t if is_adapter(name) else modules_of(model.spec).rescale_initial(name, t, layers=model.spec.layers)


def _fill_initial_values(module: nn.Module, name: str, t: Tensor, generator: torch.Generator) -> None:
    """Fill `t` with the initial values of the table in `init_weights`."""
    # The module and the last part of the name tell what a tensor is. The earlier parts may be any words, such as the
    # names of tasks.
    tensor_name = name.rpartition(".")[2]
    if tensor_name.startswith(f"{MARK}b"):
        nn.init.zeros_(t)
    elif tensor_name.startswith(MARK):
        nn.init.kaiming_uniform_(t, a=math.sqrt(5), generator=generator)
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm) or tensor_name.startswith("norm_"):
        nn.init.constant_(t, 0.0 if "bias" in tensor_name else 1.0)
    elif tensor_name == "log_temperature":
        nn.init.constant_(t, math.log(INITIAL_TEMPERATURE - MIN_TEMPERATURE))
    elif tensor_name == "expert_EQ":
        nn.init.orthogonal_(t, gain=0.32, generator=generator)
    elif tensor_name == "row_gain_D":
        nn.init.constant_(t, 0.01)
    elif tensor_name == "log_scale":
        nn.init.constant_(t, math.log(1 / 0.07))
    elif isinstance(module, nn.Embedding) or (name.startswith("output.") and t.ndim == 2):
        nn.init.normal_(t, std=t.shape[1] ** -0.5, generator=generator)
    # The papers do not describe head or merge projections of several layers. Each layer is initialized as if it were
    # the only one.
    elif ".moe.head." in name or ".moe.merge." in name:
        _fill_projection(module, name, t, generator)
    elif t.ndim == 1:
        _fill_bias(module, name, t, generator)
    else:
        nn.init.kaiming_uniform_(t, a=math.sqrt(5), generator=generator)


def _fill_projection(module: nn.Module, name: str, t: Tensor, generator: torch.Generator) -> None:
    is_head = ".moe.head." in name
    if t.ndim == 2:
        nn.init.xavier_uniform_(t, gain=2**-0.5 if is_head else 1.0, generator=generator)
    elif is_head:
        _fill_bias(module, name, t, generator)
    else:
        nn.init.zeros_(t)


def _fill_bias(module: nn.Module, name: str, t: Tensor, generator: torch.Generator) -> None:
    fan_in = _fan_in(module, name)
    nn.init.uniform_(t, -(fan_in**-0.5), fan_in**-0.5, generator=generator)


def _fan_in(module: nn.Module, bias_name: str) -> int:
    if isinstance(module, nn.Linear):
        return module.in_features
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        return math.prod(module.weight.shape[1:])
    # In a feed-forward layer the names of a bias and its matrix both begin with fc1 or fc2.
    layer = bias_name.rpartition(".")[2][:3]
    return next(p.shape[-1] for name, p in module.named_parameters() if name[:3] == layer)
