"""Masks of masked pre-training: pure functions of a seed and a label, equal on every machine and in every process.

The label of a sample names its part of a micro-batch and its position in the training, so a mask depends neither on the
number of ranks nor on restarts. Sizes and shares are those of BEiT v2 (arXiv 2208.06366) and BEiT-3 (arXiv 2208.10442).
"""

import math
from decimal import Decimal

import numpy as np

from mhmoe_ray.data.draws import Draws
from mhmoe_ray.spec.train import hidden_count

MIN_BLOCK_SHARE = 16 / 14**2
"""Smallest area of a block of hidden patches, as a share of all patches: 16 of 14 x 14 patches in BEiT v2."""
MIN_ASPECT = Decimal("0.3")
"""Smallest ratio of height to width of a block of hidden patches; the largest ratio is its inverse."""
TRIES = 10
"""Number of blocks that are drawn in a row; if none of them can be added to the mask, single patches complete it."""


def block_mask(rows: int, columns: int, share: float, seed: int, label: str) -> np.ndarray:
    """Return a mask of the hidden patches of an image, (rows, columns) bool: blocks, completed by single patches.

    The number of hidden patches is exactly the share of all patches, rounded.
    """
    draws = Draws(seed, label)
    mask = np.zeros((rows, columns), np.bool_)
    count = hidden_count(rows * columns, share)
    min_area = MIN_BLOCK_SHARE * rows * columns
    while (missing_count := count - int(mask.sum())) > 0:
        if not any(_add_block(mask, draws, min_area, missing_count) for _ in range(TRIES)):
            mask.flat[draws.choose(np.flatnonzero(~mask), missing_count)] = True
    return mask


def _add_block(mask: np.ndarray, draws: Draws, min_area: float, missing_count: int) -> bool:
    """Add a random block to the mask if it hides 1 to `missing_count` more patches; return whether it was added."""
    rows, columns = mask.shape
    area = draws.between(min(min_area, missing_count), missing_count)
    aspect = draws.ratio(MIN_ASPECT)
    height, width = (max(1, math.floor(math.sqrt(value) + 0.5)) for value in (area * aspect, area / aspect))
    if height > rows or width > columns:
        return False
    row, column = draws.integer(0, rows - height), draws.integer(0, columns - width)
    block = mask[row : row + height, column : column + width]
    if not 0 < block.size - int(block.sum()) <= missing_count:
        return False
    block[:] = True
    return True


MASK_TOKEN_SHARE, RANDOM_TOKEN_SHARE = 0.8, 0.1
"""Shares of hidden tokens that are replaced by the mask token and by a random token; the others stay as they are
(BERT, arXiv 1810.04805)."""


def hide_tokens(tokens: np.ndarray, mask: np.ndarray, vocab_size: int, seed: int, label: str) -> np.ndarray:
    """Return tokens as the model reads them: hidden ones become the mask token, `vocab_size` - 1, or random or stay."""
    inputs, hidden = tokens.copy(), np.flatnonzero(mask)
    draws = Draws(seed, label)
    fate, random_token = draws.uniform(len(hidden)), draws.uniform(len(hidden))
    random_tokens = (random_token * (vocab_size - 1)).astype(tokens.dtype)
    is_random = fate < MASK_TOKEN_SHARE + RANDOM_TOKEN_SHARE
    inputs[hidden[is_random]] = random_tokens[is_random]
    inputs[hidden[fate < MASK_TOKEN_SHARE]] = vocab_size - 1
    return inputs


def masked_count(tokens: int, share: float) -> int:
    """Return how many tokens of a text to hide: a rounded share, at least one, and never all of two or more."""
    return max(1, min(hidden_count(tokens, share), tokens - 1))


def text_mask(tokens: int, share: float, seed: int, label: str) -> np.ndarray:
    """Return a random mask of the hidden tokens of a text, (tokens,) bool; `masked_count` determines their number."""
    mask = np.zeros(tokens, np.bool_)
    mask[Draws(seed, label).choose(np.arange(tokens), masked_count(tokens, share))] = True
    return mask
