"""Initial weights as a pure function of (seed, tensor name, global expert id): the same on any number of ranks."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from mhmoe_ray.model import router
from mhmoe_ray.model.architectures import modules_of
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.model.feedforward import Experts
from mhmoe_ray.model.held import is_shared_out, local, offset
from mhmoe_ray.model.noise import seeded_generator


@torch.no_grad()
def init_weights(model: Decoder, seed: int, on_tensor: Callable[[], None] = lambda: None) -> None:
    """Initialize every parameter and buffer of `model`, or this rank's shard of a DTensor.

    At most one whole tensor is in CPU memory at a time; of stacked experts, at most one expert.

    | tensor | initial values |
    | --- | --- |
    | embedding, untied output | normal, sd d^-0.5 |
    | attention | as nn.Linear (torchscale has a Xavier initialization for it that nothing calls) |
    | feed-forward, experts | as nn.Linear, every expert under a seed of its own |
    | head projection | Xavier with gain 1/sqrt 2, bias uniform in +-d^-0.5 |
    | merge projection | Xavier, bias 0 |
    | router | as nn.Linear; X-MoE's expert embeddings orthogonal, gain 0.32 |
    | norms | 1, bias 0 |

    The architecture may then change them (`Modules.rescale_initial`), as subln does. The initialization of several
    projection layers is not published: each is treated as the only one.

    Args:
        model: the model to initialize.
        seed: seed of the run.
        on_tensor: function that is called after each parameter.
    """
    rescale = partial(modules_of(model.spec).rescale_initial, layers=model.spec.layers)
    for module_name, module in model.named_modules():
        for name, tensor in module.named_parameters(recurse=False):
            full = f"{module_name}.{name}"
            here, at = local(tensor), offset(tensor)
            if isinstance(module, Experts):
                first = at[0] if is_shared_out(tensor) else module.held.start
                for expert, weight in enumerate(here, start=first):
                    weight.copy_(_drawn(module, full, weight, seeded_generator(f"{seed}:{full}.{expert}"), rescale))
            else:
                whole = _drawn(module, full, tensor, seeded_generator(f"{seed}:{full}"), rescale)
                here.copy_(whole[tuple(slice(o, o + n) for o, n in zip(at, here.shape, strict=True))])
            on_tensor()
        for buffer in module.buffers(recurse=False):
            buffer.zero_()


def _drawn(
    module: nn.Module, name: str, like: Tensor, g: torch.Generator, rescale: Callable[[str, Tensor], Tensor]
) -> Tensor:
    """Return the initial values of a whole tensor, or of one whole expert's part of a stacked one, in CPU memory."""
    t = torch.empty(like.shape, dtype=like.dtype)
    _fill(module, name, t, g)
    return rescale(name, t)


def _fill(module: nn.Module, name: str, t: Tensor, g: torch.Generator) -> None:
    if "norm" in name:
        nn.init.constant_(t, 0.0 if "bias" in name else 1.0)
    elif "temperature" in name:
        nn.init.constant_(t, math.log(router.INITIAL_TEMPERATURE - router.LOWEST_TEMPERATURE))
    elif "expert_EQ" in name:
        nn.init.orthogonal_(t, gain=0.32, generator=g)
    elif "embedding" in name or name.startswith("output."):
        nn.init.normal_(t, std=t.shape[1] ** -0.5, generator=g)
    elif ".head." in name or ".merge." in name:
        _fill_projection(name, t, g)
    elif t.ndim == 1:  # as nn.Linear: by the fan-in of its matrix
        width = _fan_in(module, name)
        nn.init.uniform_(t, -(width**-0.5), width**-0.5, generator=g)
    else:
        nn.init.kaiming_uniform_(t, a=math.sqrt(5), generator=g)


def _fill_projection(name: str, t: Tensor, g: torch.Generator) -> None:
    is_head = ".head." in name
    if t.ndim == 2:
        nn.init.xavier_uniform_(t, gain=2**-0.5 if is_head else 1.0, generator=g)
    elif is_head:
        nn.init.uniform_(t, -(t.shape[0] ** -0.5), t.shape[0] ** -0.5, generator=g)
    else:
        nn.init.zeros_(t)


def _fan_in(module: nn.Module, bias: str) -> int:
    """Return the fan-in of the matrix that a bias belongs to; in a feed-forward layer, the bias's name says whether
    that is fc1 or fc2."""
    if isinstance(module, nn.Linear):
        return module.in_features
    layer = bias.rpartition(".")[2][:3]
    return next(p.shape[-1] for name, p in module.named_parameters() if name[:3] == layer)
