"""Paged KV cache: keys and values of all requests in one pool of blocks, and the decoder's view of them in one step.

The tokens of a step are one long sequence, request by request, padded to a multiple of `ROW_MULTIPLE`. Matrix products
then give a token a bit-identical result, whatever other tokens are in the step (`mhmoe_kernels.packed`). Attention is
computed chunk by chunk, for the same reason and because a request attends only to its own keys.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mhmoe_kernels.packed import ROW_MULTIPLE
from mhmoe_ray.serving.engine.block_pool import BLOCK_SIZE, count_blocks
from mhmoe_ray.spec import ModelSpec


class PagedCache:
    """Keys and values of all layers; the tokens of block `b` are in the slots from `b * BLOCK_SIZE` on."""

    def __init__(self, spec: ModelSpec, block_count: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (spec.layers, block_count * BLOCK_SIZE, spec.n_kv_heads, spec.head_width)
        # On a CPU the system allocates a page of zeros only when it is first written, so unused blocks cost nothing.
        self.k_LSHC, self.v_LSHC = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))


class PagedChunk(NamedTuple):
    """Tokens of a request that one step computes, and the request's blocks."""

    block_ids: Sequence[int]
    cached_tokens: int
    """Number of the request's tokens that are in the cache already."""
    new_tokens: int
    logit_count: int
    """Number of tokens at the chunk's end whose logits are returned."""


class PagedStep:
    """The KV cache in one step, as a `model.decoder.KeyValueCache`, with all requests in one sequence."""

    def __init__(self, cache: PagedCache, chunks: Sequence[PagedChunk]) -> None:
        """Lay out the tokens of a step, in the order of `chunks`."""
        self._cache = cache
        device = cache.k_LSHC.device
        self.token_count = sum(chunk.new_tokens for chunk in chunks)
        self.padded_count = _round_up(self.token_count)
        position_T = torch.zeros(self.padded_count, dtype=torch.long)
        slot_T = torch.empty(self.token_count, dtype=torch.long)
        logit_rows: list[int] = []
        self._request_caches: list[_RequestCache] = []
        row = 0
        for chunk in chunks:
            end = chunk.cached_tokens + chunk.new_tokens
            request_slot_T = slot_mapping(chunk.block_ids, end)
            position_T[row : row + chunk.new_tokens] = torch.arange(chunk.cached_tokens, end)
            slot_T[row : row + chunk.new_tokens] = request_slot_T[chunk.cached_tokens :]
            mask_TT = None
            # A single token attends to all cached tokens, so it needs no mask.
            if chunk.new_tokens > 1:
                mask_TT = torch.ones(chunk.new_tokens, end, dtype=torch.bool, device=device).tril(chunk.cached_tokens)
            self._request_caches.append(_RequestCache(cache, chunk.block_ids, request_slot_T.to(device), mask_TT))
            row += chunk.new_tokens
            logit_rows += range(row - chunk.logit_count, row)
        self._lengths = [chunk.new_tokens for chunk in chunks]
        if self.padded_count > self.token_count:
            self._lengths.append(self.padded_count - self.token_count)
        self.position_T, self._slot_T = position_T.to(device), slot_T.to(device)
        self.logit_count = len(logit_rows)
        # The output layer needs a multiple of `ROW_MULTIPLE` rows too. Copies of row 0 are added for this, and the
        # logits of these copies are not read.
        padded_rows = [*logit_rows, *[0] * (_round_up(len(logit_rows)) - len(logit_rows))]
        self._logit_row_R = torch.tensor(padded_rows, dtype=torch.long, device=device)

    def attend(self, layer: int, q_BHTC: Tensor, k_BHTC: Tensor, v_BHTC: Tensor) -> Tensor:
        """Store the step's keys and values in a layer; each token attends to its own request up to itself."""
        for cache_LSHC, new_BHTC in ((self._cache.k_LSHC, k_BHTC), (self._cache.v_LSHC, v_BHTC)):
            new_THC = new_BHTC[0].transpose(0, 1)[: self.token_count]
            cache_LSHC[layer].index_copy_(0, self._slot_T, new_THC.to(cache_LSHC.dtype))
        queries = torch.split(q_BHTC.to(self._cache.k_LSHC.dtype), self._lengths, dim=2)
        outputs = [
            request_cache.attend(layer, q) for request_cache, q in zip(self._request_caches, queries, strict=False)
        ]
        # Padding rows need outputs too, but these are never used, so the queries of the padding serve as its outputs.
        return torch.cat([*outputs, *queries[len(outputs) :]], dim=2).to(q_BHTC.dtype)

    def requested_rows(self, x_BTM: Tensor) -> Tensor:
        """Return the hidden states whose logits are needed, padded to a multiple of `ROW_MULTIPLE`."""
        return x_BTM[:, self._logit_row_R]


class _RequestCache:
    """View of the keys and values of one request, including those of the step's tokens."""

    def __init__(self, cache: PagedCache, block_ids: Sequence[int], slot_T: Tensor, mask_TT: Tensor | None) -> None:
        self._cache, self._slot_T, self._mask_TT = cache, slot_T, mask_TT
        self._views: tuple[Tensor, ...] | None = None
        """Views of all layers' keys and values; None to gather them if blocks are not contiguous."""
        used_ids = block_ids[: count_blocks(len(slot_T))]
        if list(used_ids) == list(range(used_ids[0], used_ids[0] + len(used_ids))):
            slot_range = slice(used_ids[0] * BLOCK_SIZE, used_ids[0] * BLOCK_SIZE + len(slot_T))
            self._views = tuple(t_LSHC[:, slot_range].transpose(1, 2) for t_LSHC in (cache.k_LSHC, cache.v_LSHC))

    def attend(self, layer: int, q_1HTC: Tensor) -> Tensor:
        if self._views:
            k, v = (t_LHTC[layer : layer + 1] for t_LHTC in self._views)
        else:
            caches = (self._cache.k_LSHC, self._cache.v_LSHC)
            k, v = (t[layer].index_select(0, self._slot_T).transpose(0, 1)[None] for t in caches)
        is_grouped = q_1HTC.shape[1] != k.shape[1]
        if is_grouped and self._mask_TT is None and k.device.type == "cpu":
            return _attend_grouped(q_1HTC, k[0], v[0])
        return F.scaled_dot_product_attention(q_1HTC, k, v, attn_mask=self._mask_TT, enable_gqa=is_grouped)


def _attend_grouped(q_1H1C: Tensor, k_GTC: Tensor, v_GTC: Tensor) -> Tensor:
    """Return the grouped-query attention output of a single token.

    Each group of query heads reads its keys once, while torch's own attention reads them once per head.
    """
    q = q_1H1C.view(len(k_GTC), -1, q_1H1C.shape[-1]) * q_1H1C.shape[-1] ** -0.5
    weight = torch.bmm(q, k_GTC.transpose(1, 2)).float().softmax(-1).to(v_GTC.dtype)
    return torch.bmm(weight, v_GTC).view_as(q_1H1C)


def slot_mapping(block_ids: Sequence[int], token_count: int) -> Tensor:
    """Return the cache slots that hold the first `token_count` tokens of a request."""
    block_T = torch.tensor(block_ids[: count_blocks(token_count)], dtype=torch.long)
    return (block_T[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE)).flatten()[:token_count]


def _round_up(rows: int) -> int:
    return -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE
