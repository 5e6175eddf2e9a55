"""The decoder: pre-norm blocks of attention and SwiGLU or mixture-of-experts layers, tied embeddings (as in P2)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhmoe_kernels.weights import swiglu
from mhmoe_ray.model.attention import Attention, KVCache, rotary_angles
from mhmoe_ray.model.moe import MultiHeadMoE
from mhmoe_ray.model.router import Routing
from mhmoe_ray.spec import ModelSpec


class FeedForward(nn.Module):
    """Dense SwiGLU."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.gate = nn.Linear(spec.d_model, spec.d_ff, bias=False)
        self.up = nn.Linear(spec.d_model, spec.d_ff, bias=False)
        self.down = nn.Linear(spec.d_ff, spec.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return swiglu(x, self.gate.weight, self.up.weight, self.down.weight)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)); the feed-forward is dense or a mixture of experts."""

    def __init__(self, spec: ModelSpec, layer: int, held: range | None) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(spec.d_model, spec.norm_eps)
        self.attention = Attention(spec)
        self.ffn_norm = nn.RMSNorm(spec.d_model, spec.norm_eps)
        if spec.is_moe_layer(layer):
            self.moe = MultiHeadMoE(spec, held)
        else:
            self.ffn = FeedForward(spec)

    def forward(
        self, x_BTM: Tensor, rotary: tuple[Tensor, Tensor], cache: KVCache | None
    ) -> tuple[Tensor, Routing | None]:
        x_BTM = x_BTM + self.attention(self.attention_norm(x_BTM), rotary, cache)
        y_BTM = self.ffn_norm(x_BTM)
        if hasattr(self, "moe"):
            y_BTM, routing = self.moe(y_BTM)
            return x_BTM + y_BTM, routing
        return x_BTM + self.ffn(y_BTM), None


class Output(NamedTuple):
    logits_BTV: Tensor
    routing: list[Routing]
    """One per mixture-of-experts layer, from the bottom."""


class Decoder(nn.Module):
    def __init__(self, spec: ModelSpec, held: range | None = None) -> None:
        """Weights are left unset: call `model.init.init_weights`, or load a checkpoint.

        Args:
            spec: sizes.
            held: global ids of the experts this process holds in every layer; all by default.
        """
        super().__init__()
        self.spec = spec
        self.embedding = nn.Embedding(spec.vocab_size, spec.d_model)
        self.blocks = nn.ModuleList(Block(spec, i, held) for i in range(spec.layers))
        self.norm = nn.RMSNorm(spec.d_model, spec.norm_eps)

    def forward(self, token_BT: Tensor, caches: list[KVCache] | None = None) -> Output:
        """Next-token logits.

        Args:
            token_BT: int64 ids; with caches, the tokens that follow what they hold.
            caches: one per block (`new_caches`), extended in place.
        """
        start = caches[0].length if caches else 0
        rotary = rotary_angles(self.spec, start, start + token_BT.shape[1], token_BT.device)
        x_BTM = self.embedding(token_BT)
        routings = []
        for i, block in enumerate(self.blocks):
            x_BTM, routing = block(x_BTM, rotary, caches[i] if caches else None)
            if routing is not None:
                routings.append(routing)
        return Output(F.linear(self.norm(x_BTM), self.embedding.weight), routings)

    def new_caches(self, batch: int, capacity: int) -> list[KVCache]:
        """Empty key-value caches for `capacity` tokens of `batch` sequences."""
        return [KVCache(self.spec, batch, capacity, self.embedding.weight) for _ in self.blocks]

    def moe_layers(self) -> list[MultiHeadMoE]:
        return [m for m in self.modules() if isinstance(m, MultiHeadMoE)]


def token_losses(logits_BTV: Tensor, target_BT: Tensor) -> Tensor:
    """Cross-entropy of each token in nats, float32, shape BT."""
    loss = F.cross_entropy(logits_BTV.float().flatten(0, 1), target_BT.flatten(), reduction="none")
    return loss.view(target_BT.shape)


def balance_loss(routing: list[Routing]) -> Tensor:
    """Sum over the mixture-of-experts layers; each is 1 when its router is uniform."""
    return torch.stack([r.balance_loss for r in routing]).sum()
