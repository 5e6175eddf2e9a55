"""Logits of a decoder with a paged KV cache, as serving computes them, for tests of the model."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.serving.engine.block_pool import count_blocks
from mhmoe_ray.serving.engine.paged_cache import PagedCache, PagedChunk, PagedStep


def logits_in_parts(model: Decoder, token_BT: Tensor, sizes: Sequence[int]) -> Tensor:
    """Compute sequences in several steps with a paged KV cache, and return the logits of all tokens.

    Step i computes the next `sizes[i]` tokens of every sequence. The cache blocks of the sequences are interleaved.
    """
    B, T = token_BT.shape
    blocks_per_sequence, weight = count_blocks(T), model.blocks[0].attention.qkv.weight
    cache = PagedCache(model.spec, B * blocks_per_sequence, weight.dtype, weight.device)
    parts, cached_tokens = [], 0
    for size in sizes:
        step = PagedStep(
            cache, [PagedChunk(range(b, B * blocks_per_sequence, B), cached_tokens, size, size) for b in range(B)]
        )
        token_1T = torch.zeros(1, step.padded_count, dtype=torch.long)
        token_1T[0, : step.token_count] = token_BT[:, cached_tokens : cached_tokens + size].flatten()
        logits_BTV = model(token_1T, step).logits_BTV[:, : step.logit_count]
        parts.append(logits_BTV.view(B, size, -1))
        cached_tokens += size
    return torch.cat(parts, 1)
