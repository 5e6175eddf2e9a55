"""Keys and values of all requests in one pool of blocks, and the decoder's view of them in one step.

The tokens of a step are concatenated, those of each request together (a batch of one row), and padded to a multiple of
`MULTIPLE`: with such a number of rows, matrix products give a token the same result to the last bit whatever other
tokens are beside it (`mhmoe_kernels.packed`). Attention is computed request by request and piece by piece, for the same
reason and because each request attends to keys of its own.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mhmoe_kernels.packed import MULTIPLE
from mhmoe_ray.serve.engine.block_pool import BLOCK, blocks_for
from mhmoe_ray.spec import ModelSpec


class PagedCache:
    def __init__(self, spec: ModelSpec, blocks: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (spec.layers, blocks * BLOCK, spec.n_kv_heads, spec.head_width)
        # Zeros, so that the system gives memory only where there is something to keep.
        self.k_LSHC, self.v_LSHC = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))


class Span(NamedTuple):
    """Tokens of a request that one step computes."""

    blocks: Sequence[int]
    """Ids of the request's blocks."""
    before: int
    """Number of the request's tokens that are in the cache."""
    tokens: int
    """Number of tokens that this step computes."""
    wanted: int
    """Number of these tokens, counted from the last one back, whose logits are wanted."""


class PagedStep:
    """The KV cache as the decoder sees it in one step: an implementation of `model.decoder.Past`."""

    def __init__(self, cache: PagedCache, spans: Sequence[Span]) -> None:
        self._cache = cache
        device = cache.k_LSHC.device
        self.tokens = sum(span.tokens for span in spans)
        self.room = _rounded(self.tokens)
        position_T = torch.zeros(self.room, dtype=torch.long)
        slot_T = torch.empty(self.tokens, dtype=torch.long)
        wanted: list[int] = []
        self._held: list[_Held] = []
        at = 0
        for span in spans:
            end = span.before + span.tokens
            own_T = slots(span.blocks, end)
            position_T[at : at + span.tokens] = torch.arange(span.before, end)
            slot_T[at : at + span.tokens] = own_T[span.before :]
            mask_TT = None
            if span.tokens > 1:
                mask_TT = torch.ones(span.tokens, end, dtype=torch.bool, device=device).tril(span.before)
            self._held.append(_Held(cache, span.blocks, own_T.to(device), mask_TT))
            at += span.tokens
            wanted += range(at - span.wanted, at)
        self._lengths = [span.tokens for span in spans]
        if self.room > self.tokens:
            self._lengths.append(self.room - self.tokens)
        self.position_T, self._slot_T = position_T.to(device), slot_T.to(device)
        self.wanted_rows = len(wanted)
        filled = [*wanted, *[0] * (_rounded(len(wanted)) - len(wanted))]
        self._wanted = torch.tensor(filled, dtype=torch.long, device=device)

    def attend(self, layer: int, q_BHTC: Tensor, k_BHTC: Tensor, v_BHTC: Tensor) -> Tensor:
        for into_LSHC, new in ((self._cache.k_LSHC, k_BHTC), (self._cache.v_LSHC, v_BHTC)):
            new_THC = new[0].transpose(0, 1)[: self.tokens]
            into_LSHC[layer].index_copy_(0, self._slot_T, new_THC.to(into_LSHC.dtype))
        queries = torch.split(q_BHTC.to(self._cache.k_LSHC.dtype), self._lengths, dim=2)
        answers = [held.attend(layer, q) for held, q in zip(self._held, queries, strict=False)]
        return torch.cat([*answers, *queries[len(answers) :]], dim=2).to(q_BHTC.dtype)  # anything fills up

    def wanted(self, x_BTM: Tensor) -> Tensor:
        return x_BTM[:, self._wanted]


class _Held:
    """Keys and values of one request, including those of the step's tokens."""

    def __init__(self, cache: PagedCache, blocks: Sequence[int], slot_T: Tensor, mask_TT: Tensor | None) -> None:
        self._cache, self._slot_T, self._mask_TT = cache, slot_T, mask_TT
        self._views: tuple[Tensor, ...] | None = None
        """Views of the keys and of the values of all layers, if the request's blocks are contiguous; otherwise None,
        and they are gathered for each layer."""
        used = blocks[: blocks_for(len(slot_T))]
        if list(used) == list(range(used[0], used[0] + len(used))):
            here = slice(used[0] * BLOCK, used[0] * BLOCK + len(slot_T))
            self._views = tuple(t_LSHC[:, here].transpose(1, 2) for t_LSHC in (cache.k_LSHC, cache.v_LSHC))

    def attend(self, layer: int, q_1HTC: Tensor) -> Tensor:
        if self._views:
            k, v = (t_LHTC[layer : layer + 1] for t_LHTC in self._views)
        else:
            both = (self._cache.k_LSHC, self._cache.v_LSHC)
            k, v = (t[layer].index_select(0, self._slot_T).transpose(0, 1)[None] for t in both)
        grouped = q_1HTC.shape[1] != k.shape[1]
        if grouped and self._mask_TT is None and k.device.type == "cpu":
            return _grouped(q_1HTC, k[0], v[0])
        return F.scaled_dot_product_attention(q_1HTC, k, v, attn_mask=self._mask_TT, enable_gqa=grouped)


def _grouped(q_1H1C: Tensor, k_GTC: Tensor, v_GTC: Tensor) -> Tensor:
    """Grouped-query attention of a single token: each group of heads reads its keys once, while torch's own attention
    reads them once per head."""
    q = q_1H1C.view(len(k_GTC), -1, q_1H1C.shape[-1]) * q_1H1C.shape[-1] ** -0.5
    share = torch.bmm(q, k_GTC.transpose(1, 2)).float().softmax(-1).to(v_GTC.dtype)
    return torch.bmm(share, v_GTC).view_as(q_1H1C)


def slots(blocks: Sequence[int], tokens: int) -> Tensor:
    """Return the slots in the cache of a request's first `tokens` tokens."""
    block_T = torch.tensor(blocks[: blocks_for(tokens)], dtype=torch.long)
    return (block_T[:, None] * BLOCK + torch.arange(BLOCK)).flatten()[:tokens]


def _rounded(rows: int) -> int:
    return -(-rows // MULTIPLE) * MULTIPLE
