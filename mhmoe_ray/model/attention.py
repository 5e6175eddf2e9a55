"""Causal self-attention with rotary positions and document masks."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhmoe_ray.model.architectures import modules_of
from mhmoe_ray.model.noise import default_generator_from
from mhmoe_ray.spec import ModelSpec

CachedAttention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Function (q_BHTC, k_BHTC, v_BHTC) -> y_BHTC for generation. It stores the keys and values of the newest tokens in the
KV cache and attends to these and all earlier tokens."""


class RotaryTables(NamedTuple):
    """Cosines and sines of T positions, float32. The tables of queries and keys differ only under xPos."""

    q_cos_TC: Tensor
    q_sin_TC: Tensor
    k_cos_TC: Tensor
    k_sin_TC: Tensor


def rotary_tables(spec: ModelSpec, position_T: Tensor) -> RotaryTables:
    """Return RoPE's tables of positions (arXiv 2104.09864, half-split pairing).

    If the architecture has a `query_scale`, the tables of queries are multiplied by it, and those of keys are divided.
    """
    # In float64, because the angles of late positions would lose digits in float32.
    width, position = spec.head_width, position_T.double()
    even_indices = torch.arange(0, width, 2, device=position.device, dtype=torch.float64)
    angle = torch.outer(position, spec.rope_theta ** (-even_indices / width)).repeat(1, 2)
    cos, sin = angle.cos(), angle.sin()
    scale = modules_of(spec).query_scale(width, position)
    if scale is None:
        return RotaryTables(cos.float(), sin.float(), cos.float(), sin.float())
    return RotaryTables((cos * scale).float(), (sin * scale).float(), (cos / scale).float(), (sin / scale).float())


def document_indices(token_BT: Tensor, start_token: int) -> Tensor:
    """Return the index (B, T) of each token's document within its sequence. Each `start_token` begins a document; the
    tokens before the first one have index 0."""
    return token_BT.eq(start_token).cumsum(1)


def document_mask(document_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mask (B, 1, T, T) that is added to attention scores: 0 where a token may attend, which is to itself
    and to earlier tokens of its document, and -inf elsewhere.

    Positions need not restart in each document, because RoPE and xPos depend only on the distance between two tokens.

    Args:
        document_BT: index of each token's document, int.
        dtype: dtype of the queries.
    """
    # The mask is not boolean, because every layer would convert it into one like this, and keep its own copy for the
    # backward.
    visible_BTT = (document_BT[:, :, None] == document_BT[:, None, :]).tril()
    return torch.zeros_like(visible_BTT, dtype=dtype).masked_fill_(~visible_BTT, float("-inf"))[:, None]


def _rotate(x_BHTC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    first_half, second_half = x_BHTC.chunk(2, dim=-1)
    return (x_BHTC * cos_TC + torch.cat((-second_half, first_half), dim=-1) * sin_TC).to(x_BHTC.dtype)


class Attention(nn.Module):
    """Causal self-attention with H heads. Several heads may share keys and values (grouped queries)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        modules = modules_of(spec)
        bias = modules.attention_bias
        self.heads, self.kv_heads, self.width = spec.attention_heads, spec.n_kv_heads, spec.head_width
        self.dropout = spec.attention_dropout
        self.qkv = nn.Linear(spec.d_model, (self.heads + 2 * self.kv_heads) * self.width, bias=bias)
        """Projection to all queries, then all keys, then all values."""
        self.inner_norm = modules.inner_norm(spec)
        self.out = nn.Linear(spec.d_model, spec.d_model, bias=bias)

    def forward(
        self,
        x_BTM: Tensor,
        tables: RotaryTables,
        cached_attention: CachedAttention | None = None,
        generator: torch.Generator | None = None,
        mask_B1TT: Tensor | None = None,
    ) -> Tensor:
        """Return the attention output of tokens, each of which attends to itself and to earlier tokens, or to those
        that a mask allows.

        Args:
            x_BTM: the T tokens.
            tables: `rotary_tables` of their positions.
            cached_attention: attention over a KV cache, for generation after earlier tokens.
            generator: generator of dropout on the attention weights; None in evaluation.
            mask_B1TT: `document_mask`; None if `cached_attention` is given.
        """
        B, T, M = x_BTM.shape
        heads_BHTC = self.qkv(x_BTM).view(B, T, -1, self.width).transpose(1, 2)
        q, k, v = heads_BHTC.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        q, k = _rotate(q, tables.q_cos_TC, tables.q_sin_TC), _rotate(k, tables.k_cos_TC, tables.k_sin_TC)
        y = cached_attention(q, k, v) if cached_attention is not None else self._attend(q, k, v, generator, mask_B1TT)
        output: Tensor = self.out(self.inner_norm(y.transpose(1, 2).reshape(B, T, M)))
        return output

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, generator: torch.Generator | None, mask_B1TT: Tensor | None
    ) -> Tensor:
        """Return causal attention without a KV cache: over earlier tokens and the token itself, or by the mask."""
        has_grouped_queries = self.kv_heads != self.heads
        dropout_rate = self.dropout if generator is not None else 0.0
        with default_generator_from(generator if dropout_rate else None):
            return F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask_B1TT,
                dropout_p=dropout_rate,
                is_causal=mask_B1TT is None,
                enable_gqa=has_grouped_queries,
            )
