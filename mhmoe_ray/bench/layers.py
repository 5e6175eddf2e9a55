"""A plain mixture of experts, others of equal multiply-adds and parameters, and a dense layer of the same work."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from mhmoe_ray.errors import SpecError
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.model.init import init_weights
from mhmoe_ray.model.moe import MultiHeadMoE
from mhmoe_ray.planner.match import MatchSpec, solve
from mhmoe_ray.spec import ModelSpec, MoESpec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Shape(NamedTuple):
    """Of the plain layer; the others follow from it."""

    tokens: int = 4096
    d_model: int = 512
    experts: int = 8
    top_k: int = 2
    d_expert: int = 2048


class Case(NamedTuple):
    name: str
    moe: MoESpec | None
    """None: the dense layer."""
    run: Callable[[], Tensor]
    """One forward and backward pass; returns the output."""
    kept: int
    """Bytes that forward keeps for backward, weights aside."""


def layer_cases(shape: Shape, heads: list[int], dtype: Literal["float32", "bfloat16"], static: bool) -> list[Case]:
    """The dense layer first.

    Args:
        shape: of the plain layer.
        heads: h of the multi-head layers.
        dtype: of weights and tokens.
        static: also the plain layer with static routing and its masks.

    Raises:
        SpecError: a layer of these sizes cannot be made, or none of so many heads matches.
    """
    plain = MoESpec(heads=1, experts=shape.experts, top_k=shape.top_k, d_expert=shape.d_expert, every=1)
    reference = _model(shape, plain)
    made: dict[str, MoESpec] = {"SMoE": plain, "X-MoE": plain.model_copy(update={"router": "xmoe"})}
    if static:
        made["SMoE static"] = plain.model_copy(update={"capacity_factor": 1.0, "kernel": "capacity"})
    for h in heads:
        if shape.d_model % h:
            raise SpecError(f"heads {h}", f"{shape.d_model} does not split into so many parts", "choose others")
        start = plain.model_copy(update={"heads": h})
        d_expert, experts = solve(_model(shape, start), reference, MatchSpec(to="SMoE", by="both"))
        made[f"MH-MoE h {h}"] = start.model_copy(update={"d_expert": d_expert, "experts": experts})
    fine = {"experts": 8 * shape.experts, "top_k": 4 * shape.top_k, "d_expert": shape.d_expert // 4}
    made["fine-grained"] = plain.model_copy(update=fine)
    dense = [_case("dense", None, _dense(shape), shape, DTYPES[dtype])]
    return dense + [_case(name, moe, _layer(shape, moe), shape, DTYPES[dtype]) for name, moe in made.items()]


def _model(shape: Shape, moe: MoESpec) -> ModelSpec:
    return ModelSpec(vocab_size=1, d_model=shape.d_model, layers=1, attention_heads=1, moe=moe)


def _layer(shape: Shape, moe: MoESpec) -> nn.Module:
    model = Decoder(_model(shape, moe))
    init_weights(model, 0)
    [layer] = model.moe_layers()
    return layer


def _dense(shape: Shape) -> nn.Module:
    """SwiGLU as wide as the k experts that a token meets."""
    wide = shape.top_k * shape.d_expert
    model = Decoder(ModelSpec(vocab_size=1, d_model=shape.d_model, layers=1, attention_heads=1, d_ff=wide))
    init_weights(model, 0)
    return model.get_submodule("blocks.0.ffn")


def _case(name: str, moe: MoESpec | None, layer: nn.Module, shape: Shape, dtype: torch.dtype) -> Case:
    layer.to(dtype)
    x_BTM = torch.randn(1, shape.tokens, shape.d_model, generator=torch.Generator().manual_seed(0)).to(dtype)
    x_BTM.requires_grad_()

    def forward() -> Tensor:
        y: Tensor = layer(x_BTM)[0] if isinstance(layer, MultiHeadMoE) else layer(x_BTM)
        return y

    def run() -> Tensor:
        y = forward()
        torch.autograd.backward(y, torch.ones_like(y))
        for leaf in (x_BTM, *layer.parameters()):
            leaf.grad = None
        return y.detach()

    return Case(name, moe, run, _kept(forward, layer))


def _kept(forward: Callable[[], Tensor], layer: nn.Module) -> int:
    weights = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept: dict[int, Tensor] = {}  # held, so that no two share an address

    def keep(t: Tensor) -> Tensor:
        address = t.untyped_storage().data_ptr()
        if address not in weights:
            kept[address] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        forward()
    return sum(t.untyped_storage().nbytes() for t in kept.values())
