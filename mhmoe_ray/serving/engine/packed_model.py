"""Packed models for inference on a CPU: matrices get the layout of oneDNN, and the original ones are freed."""

from typing import cast

import torch
from torch import Tensor, nn

from mhmoe_kernels import widen
from mhmoe_kernels.packed import PackedMatrix, pack_layer, run_packed
from mhmoe_ray.model.decoder import Block, Decoder
from mhmoe_ray.model.feedforward import Dispatch, Experts, FeedForward, SharedExpert
from mhmoe_ray.model.router import NO_CONTEXT, BaseRouter, Router, Routing, RoutingContext


class PackedLinear(nn.Module):
    """A linear layer whose matrix has the layout of oneDNN (`mhmoe_kernels.packed`)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._matrix = PackedMatrix(linear.weight, linear.bias)

    def forward(self, x: Tensor, generator: None = None) -> Tensor:
        return self._matrix(x)


class PackedFeedForward(nn.Module):
    """A feed-forward layer with packed matrices."""

    def __init__(self, layer: FeedForward) -> None:
        super().__init__()
        self._function = pack_layer(layer.function, tuple(layer.parameters()))

    def forward(self, x: Tensor) -> Tensor:
        return self._function(x)


class PackedExperts(nn.Module):
    """All experts of a layer with packed matrices, in place of `Experts`; one process holds all of them."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        expert_weights = zip(*(p.unbind() for p in experts.parameters()), strict=True)
        self._experts = [pack_layer(experts.function, weights) for weights in expert_weights]

    def forward(
        self, x_ND: Tensor, routing: Routing, dispatch: Dispatch, shared: SharedExpert | None
    ) -> tuple[Tensor, None]:
        assert shared is None, "without other ranks, the layer computes its shared expert itself"
        return run_packed(x_ND, routing.expert_NK, routing.gate_NK, self._experts), None


class InferenceRouter(BaseRouter):
    """A router that chooses the same experts as in training, without losses and statistics that only training needs."""

    def __init__(self, router: Router) -> None:
        super().__init__(router.moe)
        self._router = router
        self._empty_tensor = torch.zeros(0)

    def forward(
        self, x_ND: Tensor, generator: torch.Generator | None = None, context: RoutingContext = NO_CONTEXT
    ) -> Routing:
        # The scores stay float32 even if the model computes in bfloat16, as in training.
        with torch.autocast(x_ND.device.type, enabled=False):
            expert_NK, gate_NK, _probability = self._router.choose_experts(self._router.scores(widen(x_ND)))
        empty_tensor = self._empty_tensor
        return Routing(expert_NK, gate_NK, empty_tensor, empty_tensor, empty_tensor, empty_tensor, None)


def pack_model(model: Decoder) -> None:
    """Replace the modules of a model by packed ones, in place; the model can then be neither trained nor saved.

    The model has all experts, and its matrices have the data type in which products are computed.
    """
    for block in cast("list[Block]", model.blocks):
        _pack_linears(block.attention)
        if (moe := block.moe) is not None:
            moe.router = InferenceRouter(cast("Router", moe.router))
            moe.experts = PackedExperts(moe.experts)  # type: ignore[assignment]  # called like `Experts`
            if moe.shared is not None:
                moe.shared = PackedFeedForward(moe.shared)  # type: ignore[assignment]  # called like it
            _pack_linears(moe)
        if block.ffn is not None:
            block.ffn = PackedFeedForward(block.ffn)  # type: ignore[assignment]  # called like it
    output = model.output
    # With tied embeddings the model has no output layer, so one with the embedding's matrix is made. The device meta
    # keeps `nn.Linear` from allocating a matrix of its own, which would be replaced at once.
    if output is None:
        vocab, width = model.embedding.weight.shape
        with torch.device("meta"):
            output = nn.Linear(width, vocab, bias=False)
        output.weight = model.embedding.weight
    model.output = PackedLinear(output)  # type: ignore[assignment]  # called like a linear layer


def _pack_linears(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, PackedLinear(child))
        else:
            _pack_linears(child)
