"""Initial weights as a pure function of (seed, tensor name, global expert id): the same at any number of ranks."""

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.model.moe import Experts, MultiHeadMoE

Fill = Callable[[Tensor, torch.Generator], object]


@torch.no_grad()
def init_weights(model: Decoder, seed: int) -> None:
    """Set every parameter of `model`.

    Embedding: normal, standard deviation d^-0.5, so that tied logits start near unit variance. Dense and attention
    matrices: Kaiming-uniform (a = sqrt 5), as nn.Linear. Experts: the same, each under a seed of its own. Head
    projection: Xavier-uniform with gain 1/sqrt 2, bias uniform in +-d^-0.5; merge projection: Xavier-uniform with
    gain 1, bias 0 (both as in the authors' code). Router: normal, standard deviation width^-0.5. Norms: 1.
    """
    for module_name, module in model.named_modules():
        for name, tensor in module.named_parameters(recurse=False):
            full = f"{module_name}.{name}"
            if isinstance(module, Experts):
                for expert, weight in zip(module.held, tensor, strict=True):
                    _kaiming(weight, _generator(seed, f"{full}.{expert}"))
            else:
                _rule(model, module_name, module, name)(tensor, _generator(seed, full))


def _rule(model: Decoder, module_name: str, module: nn.Module, name: str) -> Fill:
    parent = model.get_submodule(module_name.rpartition(".")[0])
    if isinstance(module, nn.RMSNorm):
        return lambda t, _: nn.init.ones_(t)
    if isinstance(module, nn.Embedding) or name == "weight_ED":
        return lambda t, g: nn.init.normal_(t, std=t.shape[1] ** -0.5, generator=g)
    if isinstance(parent, MultiHeadMoE):
        is_head = module is parent.head
        if name == "bias":
            return _bias_uniform if is_head else lambda t, _: nn.init.zeros_(t)
        return lambda t, g: nn.init.xavier_uniform_(t, gain=2**-0.5 if is_head else 1.0, generator=g)
    return _kaiming


def _kaiming(t: Tensor, g: torch.Generator) -> None:
    nn.init.kaiming_uniform_(t, a=math.sqrt(5), generator=g)


def _bias_uniform(t: Tensor, g: torch.Generator) -> None:
    nn.init.uniform_(t, -(t.shape[0] ** -0.5), t.shape[0] ** -0.5, generator=g)


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
