"""Causal self-attention with rotary positions and document masks."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhmoe_ray.model.architectures import modules_of
from mhmoe_ray.model.noise import default_draws_from
from mhmoe_ray.spec import ModelSpec

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention in generation: (q_BHTC, k_BHTC, v_BHTC) of the newest tokens -> y_BHTC. It stores their keys and values,
and attends to these tokens and all earlier ones."""


class Rotary(NamedTuple):
    """Cosines and sines of T positions, float32; the tables of queries and keys differ under xPos only."""

    q_cos_TC: Tensor
    q_sin_TC: Tensor
    k_cos_TC: Tensor
    k_sin_TC: Tensor


def rotary(spec: ModelSpec, position_T: Tensor) -> Rotary:
    """Return RoPE's tables (arXiv 2104.09864, half-split pairing), scaled by the architecture's `query_scale`."""
    width, position = spec.head_width, position_T.double()
    even = torch.arange(0, width, 2, device=position.device, dtype=torch.float64)
    angle = torch.outer(position, spec.rope_theta ** (-even / width)).repeat(1, 2)
    cos, sin = angle.cos(), angle.sin()
    scale = modules_of(spec).query_scale(width, position)
    if scale is None:
        return Rotary(cos.float(), sin.float(), cos.float(), sin.float())
    return Rotary((cos * scale).float(), (sin * scale).float(), (cos / scale).float(), (sin / scale).float())


def document_of(token_BT: Tensor, start_token: int) -> Tensor:
    """Return the index of each token's document, counted within its sequence; each start token begins a document."""
    return token_BT.eq(start_token).cumsum(1)


def document_mask(document_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mask (B, 1, T, T) that is added to attention scores: 0 where a token may attend to an earlier one or
    itself, -inf elsewhere.

    Positions do not restart in each document: RoPE and xPos depend only on the distance between two tokens, which is
    the same wherever their document begins.

    Args:
        document_BT: index of each token's document, int.
        dtype: dtype of the queries. Every layer would convert a boolean mask into one like this, and would keep its own
            copy for the backward.
    """
    visible_BTT = (document_BT[:, :, None] == document_BT[:, None, :]).tril()
    return torch.zeros_like(visible_BTT, dtype=dtype).masked_fill_(~visible_BTT, float("-inf"))[:, None]


def _rotate(x_BHTC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    first, second = x_BHTC.chunk(2, dim=-1)
    return (x_BHTC * cos_TC + torch.cat((-second, first), dim=-1) * sin_TC).to(x_BHTC.dtype)


class Attention(nn.Module):
    """Attention of H heads, several of which may share keys and values (grouped queries)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        modules = modules_of(spec)
        bias = modules.attention_bias
        self.heads, self.kv_heads, self.width = spec.attention_heads, spec.n_kv_heads, spec.head_width
        self.dropout = spec.attention_dropout
        self.qkv = nn.Linear(spec.d_model, (self.heads + 2 * self.kv_heads) * self.width, bias=bias)
        """Projection whose output rows are all queries, then all keys, then all values."""
        self.inner_norm = modules.inner_norm(spec)
        self.out = nn.Linear(spec.d_model, spec.d_model, bias=bias)

    def forward(
        self,
        x_BTM: Tensor,
        at: Rotary,
        attend: Attend | None = None,
        generator: torch.Generator | None = None,
        mask_B1TT: Tensor | None = None,
    ) -> Tensor:
        """Attend to this and all earlier tokens, or to those that a mask allows.

        Args:
            x_BTM: the T tokens.
            at: `rotary` tables of their positions.
            attend: attention over a KV cache, for generation after earlier tokens.
            generator: source of dropout on the attention weights; None in evaluation.
            mask_B1TT: `document_mask`; not used together with `attend`.
        """
        B, T, M = x_BTM.shape
        heads_BHTC = self.qkv(x_BTM).view(B, T, -1, self.width).transpose(1, 2)
        q, k, v = heads_BHTC.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        q, k = _rotate(q, at.q_cos_TC, at.q_sin_TC), _rotate(k, at.k_cos_TC, at.k_sin_TC)
        y = attend(q, k, v) if attend is not None else self._attend(q, k, v, generator, mask_B1TT)
        result: Tensor = self.out(self.inner_norm(y.transpose(1, 2).reshape(B, T, M)))
        return result

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, generator: torch.Generator | None, mask_B1TT: Tensor | None
    ) -> Tensor:
        grouped = self.kv_heads != self.heads
        rate = self.dropout if generator is not None else 0.0
        with default_draws_from(generator if rate else None):
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask_B1TT, dropout_p=rate, is_causal=mask_B1TT is None, enable_gqa=grouped
            )
