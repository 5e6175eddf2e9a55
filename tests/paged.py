"""The decoder as serving calls it, for tests of the model."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.serve.engine.block_pool import blocks_for
from mhmoe_ray.serve.engine.paged_cache import PagedCache, PagedStep, Span


def in_parts(model: Decoder, token_BT: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the logits of all tokens, where step i computes the next `sizes[i]` tokens of every sequence.

    The cache blocks of the sequences are interleaved.
    """
    B, T = token_BT.shape
    each, weight = blocks_for(T), model.blocks[0].attention.qkv.weight
    cache = PagedCache(model.spec, B * each, weight.dtype, weight.device)
    parts, before = [], 0
    for size in sizes:
        step = PagedStep(cache, [Span(range(b, B * each, B), before, size, size) for b in range(B)])
        token_1T = torch.zeros(1, step.room, dtype=torch.long)
        token_1T[0, : step.tokens] = token_BT[:, before : before + size].flatten()
        logits_BTV = model(token_1T, step).logits_BTV[:, : step.wanted_rows]
        parts.append(logits_BTV.view(B, size, -1))
        before += size
    return torch.cat(parts, 1)
