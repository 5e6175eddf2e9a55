"""Causal self-attention with rotary positions and document masks."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhmoe_kernels import widen
from mhmoe_ray.model.architectures import modules_of
from mhmoe_ray.model.noise import default_generator_from
from mhmoe_ray.model.rotary import RotaryTables, rotate
from mhmoe_ray.spec import ModelSpec

CachedAttention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Function (q_BHTC, k_BHTC, v_BHTC) -> y_BHTC for generation. It stores the keys and values of the newest tokens in the
KV cache and attends to these and all earlier tokens."""


def document_indices(document_starts_BT: Tensor) -> Tensor:
    """Return the index (B, T) of each token's document within its sequence, given a mask of the tokens that begin a
    document. The tokens before the first one have index 0."""
    return document_starts_BT.cumsum(1)


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


class Attention(nn.Module):
    """Causal self-attention with H heads. Several heads may share keys and values (grouped queries)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = spec.attention_heads, spec.n_kv_heads, spec.head_width
        self.dropout = spec.attention_dropout
        bias = spec.biased_attention
        self.qkv = nn.Linear(spec.d_model, spec.query_width + 2 * spec.kv_width, bias=bias != "none")
        """Projection to all queries, then all keys, then all values."""
        self.qk_norm = spec.qk_norm
        if spec.qk_norm != "none":
            is_per_head = spec.qk_norm == "head"
            self.q_norm = nn.RMSNorm(spec.head_width if is_per_head else spec.query_width, spec.norm_eps)
            self.k_norm = nn.RMSNorm(spec.head_width if is_per_head else spec.kv_width, spec.norm_eps)
        self.inner_norm = modules_of(spec).inner_norm(spec)
        self.out = nn.Linear(spec.query_width, spec.d_model, bias=bias == "all")

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
        B, T, _ = x_BTM.shape
        heads_BTHC = self.qkv(x_BTM).view(B, T, -1, self.width)
        q, k, v = torch.split(heads_BTHC, [self.heads, self.kv_heads, self.kv_heads], dim=2)
        if self.qk_norm != "none":
            q, k = self._normed(self.q_norm, q), self._normed(self.k_norm, k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        q, k = rotate(q, tables.q_cos_TC, tables.q_sin_TC), rotate(k, tables.k_cos_TC, tables.k_sin_TC)
        y = cached_attention(q, k, v) if cached_attention is not None else self._attend(q, k, v, generator, mask_B1TT)
        output: Tensor = self.out(self.inner_norm(y.transpose(1, 2).flatten(2)))
        return output

    def _normed(self, norm: nn.Module, rows_BTHC: Tensor) -> Tensor:
        """Return queries or keys after their norm, of each head by itself or of all heads together, in their dtype."""
        # In float32, because torch's fused norm needs the dtype of its weight.
        wide_BTHC = widen(rows_BTHC)
        if self.qk_norm == "head":
            normed_rows: Tensor = norm(wide_BTHC)
        else:
            normed_rows = norm(wide_BTHC.flatten(2)).view_as(rows_BTHC)
        return normed_rows.to(rows_BTHC.dtype)

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
