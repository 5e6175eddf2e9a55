"""Causal self-attention with rotary positions and document masks."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhmoe_kernels import widen
from mhmoe_ray.model.architectures import modules_of
from mhmoe_ray.model.autocast import matmul_dtype
from mhmoe_ray.model.linear import Linear
from mhmoe_ray.model.noise import default_generator_from
from mhmoe_ray.model.rotary import RotaryTables, rotate
from mhmoe_ray.spec import ModelSpec

CachedAttention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Function (q_BHTC, k_BHTC, v_BHTC) -> y_BHTC that stores the newest tokens' keys and values in the KV cache and
attends to all tokens so far."""


def document_indices(document_starts_BT: Tensor) -> Tensor:
    """Return the index (B, T) of each token's document in its sequence, 0 before the first start."""
    return document_starts_BT.cumsum(1)


def document_mask(document_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the causal mask (B, 1, T, T) within documents, 0 or -inf. Positions need not restart in each document,
    because RoPE and xPos depend only on distances."""
    # The mask holds 0 and -inf. Every layer would convert a boolean mask into such a mask, and keep its own copy for
    # the backward.
    visible_BTT = (document_BT[:, :, None] == document_BT[:, None, :]).tril()
    return torch.zeros_like(visible_BTT, dtype=dtype).masked_fill_(~visible_BTT, float("-inf"))[:, None]


def document_offsets(document_starts_BT: Tensor) -> Tensor:
    """Return the index of each document's first token in the flattened batch, then the number of tokens, int32. A
    sequence starts a document. The mask is in CPU memory, as its values decide the result's shape."""
    starts_BT = document_starts_BT.clone()
    starts_BT[:, 0] = True
    return torch.cat([starts_BT.flatten().nonzero()[:, 0], torch.tensor([starts_BT.numel()])]).int()


class Documents(NamedTuple):
    """Restriction of attention to each token's document, in one of two forms."""

    mask_B1TT: Tensor | None  # `document_mask`; None if attention uses the offsets instead
    offset_N1: Tensor | None  # `document_offsets` on the tokens' device; None if attention uses the mask


def has_variable_length_kernel(spec: ModelSpec, x: Tensor) -> bool:
    """Return whether torch has flash attention for documents without a mask: on NVIDIA's GPUs of compute capability 8.0
    or more. Whether it is faster has not been measured."""
    if x.device.type != "cuda" or torch.version.hip or matmul_dtype(x) not in (torch.bfloat16, torch.float16):
        return False
    # A fake tensor may claim to be on a GPU although this machine has none.
    if torch.cuda.is_available() and torch.cuda.get_device_capability(x.device) < (8, 0):
        return False
    return not spec.attention_dropout and spec.head_width % 8 == 0 and spec.head_width <= 256


class Attention(nn.Module):
    """Causal self-attention with H heads; several may share keys and values."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = spec.attention_heads, spec.n_kv_heads, spec.head_width
        self.dropout = spec.attention_dropout
        bias = spec.biased_attention
        self.qkv = Linear(spec.d_model, spec.query_width + 2 * spec.kv_width, bias=bias != "none")
        """Projection to all queries, all keys, all values."""
        self.qk_norm = spec.qk_norm
        if spec.qk_norm != "none":
            is_per_head = spec.qk_norm == "head"
            self.q_norm = nn.RMSNorm(spec.head_width if is_per_head else spec.query_width, spec.norm_eps)
            self.k_norm = nn.RMSNorm(spec.head_width if is_per_head else spec.kv_width, spec.norm_eps)
        self.inner_norm = modules_of(spec).inner_norm(spec)
        self.out = Linear(spec.query_width, spec.d_model, bias=bias == "all")

    def forward(
        self,
        x_BTM: Tensor,
        tables: RotaryTables,
        cached_attention: CachedAttention | None = None,
        generator: torch.Generator | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """Return the attention output; the generator is for dropout on attention weights and of adapters."""
        q, k, v = self.project(x_BTM, generator)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        q, k = rotate(q, tables.q_cos_TC, tables.q_sin_TC), rotate(k, tables.k_cos_TC, tables.k_sin_TC)
        y = cached_attention(q, k, v) if cached_attention is not None else self._attend(q, k, v, generator, documents)
        return self.merge(y.transpose(1, 2), generator)

    def project(self, x_BTM: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, each (B, T, heads, C), before rotation."""
        B, T, _ = x_BTM.shape
        heads_BTHC = self.qkv(x_BTM, generator).view(B, T, self.heads + 2 * self.kv_heads, self.width)
        q, k, v = torch.split(heads_BTHC, [self.heads, self.kv_heads, self.kv_heads], dim=2)
        if self.qk_norm != "none":
            q, k = self._normed(self.q_norm, q), self._normed(self.k_norm, k)
        return q, k, v

    def merge(self, y_BTHC: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Combine the outputs of all heads into the layer's output."""
        output: Tensor = self.out(self.inner_norm(y_BTHC.flatten(2)), generator)
        return output

    def _normed(self, norm: nn.Module, rows_BTHC: Tensor) -> Tensor:
        # torch's fused norm needs inputs in the dtype of its weight, which is float32.
        wide_BTHC = widen(rows_BTHC)
        if self.qk_norm == "head":
            normed_rows: Tensor = norm(wide_BTHC)
        else:
            normed_rows = norm(wide_BTHC.flatten(2)).view_as(rows_BTHC)
        return normed_rows.to(rows_BTHC.dtype)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, generator: torch.Generator | None, documents: Documents | None
    ) -> Tensor:
        if documents is not None and documents.offset_N1 is not None:
            return _attend_within_documents(q, k, v, documents.offset_N1)
        mask_B1TT = None if documents is None else documents.mask_B1TT
        has_grouped_queries = self.kv_heads != self.heads
        # Of torch's attention kernels for GPUs, the memory-efficient one takes masks and float32 but no grouped
        # queries, and the flash kernel grouped queries but neither of these. Keys and values are repeated, so that the
        # kernel that stores all T x T weights is not used.
        if has_grouped_queries and q.device.type == "cuda" and (mask_B1TT is not None or q.dtype == torch.float32):
            k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
            has_grouped_queries = False
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


def _attend_within_documents(q_BHTC: Tensor, k_BHTC: Tensor, v_BHTC: Tensor, offset_N1: Tensor) -> Tensor:
    """Return causal attention within documents, without pairs across them."""
    # In torch 2.11, `varlen_attn` does not take grouped queries, so keys and values are repeated below.
    from torch.nn.attention.varlen import varlen_attn

    B, H, T, C = q_BHTC.shape
    if k_BHTC.shape[1] != H:
        k_BHTC, v_BHTC = (t.repeat_interleave(H // t.shape[1], dim=1) for t in (k_BHTC, v_BHTC))
    q, k, v = (t.transpose(1, 2).reshape(B * T, H, C) for t in (q_BHTC, k_BHTC, v_BHTC))
    y = varlen_attn(q, k, v, offset_N1, offset_N1, T, T, window_size=(-1, 0))
    assert isinstance(y, Tensor)  # it would be a tuple if options asked for more results
    return y.view(B, T, H, C).transpose(1, 2)
