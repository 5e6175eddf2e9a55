"""Weights of a block outside its experts, for all families of models."""

from torch import nn

from mhmoe_ray.model.architectures import modules_of
from mhmoe_ray.model.attention import Attention
from mhmoe_ray.model.feedforward import FeedForward
from mhmoe_ray.spec import ModelSpec


class Branch(nn.Module):
    """Norms, attention and, if any, dense feed-forward layer of a block for one kind of input, such as images."""

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__()
        self.attention_norm = modules_of(spec).norm(spec)
        self.attention = Attention(spec)
        self.ffn_norm = modules_of(spec).norm(spec)
        self.ffn: FeedForward | None = None
        if not spec.is_moe_layer(layer) or spec.has_experts_beside:
            assert spec.d_ff is not None
            self.ffn = FeedForward(spec, spec.d_ff)
