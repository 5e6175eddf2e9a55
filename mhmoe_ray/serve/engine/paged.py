"""Keys and values of all requests in one pool of blocks, and the decoder's view of them in one step.

A step's tokens lie one after another, those of each request together (a batch of one row), filled up to a multiple of
`MULTIPLE`: so products have a number of rows at which a token's result is the same to the last bit whatever stands
beside it (`mhmoe_kernels.padded`). Attention goes request by request and piece by piece, for the same reason and since
each sees others than its neighbours do.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mhmoe_kernels.padded import MULTIPLE
from mhmoe_ray.serve.engine.blocks import BLOCK
from mhmoe_ray.spec import ModelSpec


class PagedCache:
    def __init__(self, spec: ModelSpec, blocks: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (spec.layers, blocks * BLOCK, spec.n_kv_heads, spec.head_width)
        # Zeros, so that the system gives memory only where there is something to keep.
        self.k_LSHC, self.v_LSHC = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))


class Span(NamedTuple):
    """Tokens of a request that a step computes."""

    blocks: Sequence[int]
    """Of the request."""
    before: int
    """Its tokens that are in the cache."""
    tokens: int
    """Those that come now."""
    wanted: int
    """Of these, the last so many whose logits are asked for."""


class PagedStep:
    """A `model.decoder.Past`."""

    def __init__(self, cache: PagedCache, spans: Sequence[Span]) -> None:
        self._cache, self._spans = cache, spans
        device = cache.k_LSHC.device
        self.tokens = sum(span.tokens for span in spans)
        self.room = _rounded(self.tokens)
        position_T = torch.zeros(self.room, dtype=torch.long)
        slot_T = torch.empty(self.tokens, dtype=torch.long)
        wanted: list[int] = []
        self._slots: list[Tensor | slice] = []
        at = 0
        for span in spans:
            end = span.before + span.tokens
            own_T = slots(span.blocks, end)
            position_T[at : at + span.tokens] = torch.arange(span.before, end)
            slot_T[at : at + span.tokens] = own_T[span.before :]
            first, last = int(own_T[0]), int(own_T[-1])
            # In one piece where its blocks happen to lie so; else their keys are gathered for each layer.
            contiguous = last - first == end - 1 and bool((own_T.diff() == 1).all())
            self._slots.append(slice(first, last + 1) if contiguous else own_T.to(device))
            at += span.tokens
            wanted += range(at - span.wanted, at)
        self.position_T, self._slot_T = position_T.to(device), slot_T.to(device)
        self.wanted_rows = len(wanted)
        filled = [*wanted, *[0] * (_rounded(len(wanted)) - len(wanted))]
        self._wanted = torch.tensor(filled, dtype=torch.long, device=device)

    def attend(self, layer: int, q_BHTC: Tensor, k_BHTC: Tensor, v_BHTC: Tensor) -> Tensor:
        keys_SHC, values_SHC = self._cache.k_LSHC[layer], self._cache.v_LSHC[layer]
        for into, new in ((keys_SHC, k_BHTC), (values_SHC, v_BHTC)):
            into.index_copy_(0, self._slot_T, new[0].transpose(0, 1)[: self.tokens].to(into.dtype))
        y_BHTC = torch.zeros_like(q_BHTC)
        at = 0
        for span, own in zip(self._spans, self._slots, strict=True):
            here = slice(at, at + span.tokens)
            k, v = (
                (t[own] if isinstance(own, slice) else t.index_select(0, own)).transpose(0, 1)[None]
                for t in (keys_SHC, values_SHC)
            )
            mask = None
            if span.tokens > 1:
                mask = torch.ones(span.tokens, span.before + span.tokens, dtype=torch.bool, device=q_BHTC.device)
                mask = mask.tril(span.before)
            q = q_BHTC[:, :, here].to(k.dtype)
            grouped = q.shape[1] != k.shape[1]
            y_BHTC[:, :, here] = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
            at += span.tokens
        return y_BHTC

    def wanted(self, x_BTM: Tensor) -> Tensor:
        return x_BTM[:, self._wanted]


def slots(blocks: Sequence[int], tokens: int) -> Tensor:
    """Places in the cache of a request's first tokens."""
    block_T = torch.tensor(blocks[: -(-tokens // BLOCK)], dtype=torch.long)
    return (block_T[:, None] * BLOCK + torch.arange(BLOCK)).flatten()[:tokens]


def _rounded(rows: int) -> int:
    return -(-rows // MULTIPLE) * MULTIPLE
