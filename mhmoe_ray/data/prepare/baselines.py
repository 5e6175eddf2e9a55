"""Baselines of the validation loss by counting: a unigram and a bigram model."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from mhmoe_ray.data.shards.columns import TOKENS, Samples, columns_of, target_mask
from mhmoe_ray.data.shards.manifest import Baselines


class TokenPairs(NamedTuple):
    """Pairs of neighbouring tokens: each target and the token before it, both (n,) uint32."""

    context: np.ndarray
    target: np.ndarray


def token_pairs(samples: Samples, padding: int) -> TokenPairs:
    """Pair each target of samples (n, T + 1) that counts in the loss with the token before it."""
    tokens, is_counted = columns_of(samples)[TOKENS], target_mask(samples, padding)[:, 1:]
    return TokenPairs(tokens[:, :-1][is_counted].astype(np.uint32), tokens[:, 1:][is_counted].astype(np.uint32))


def join_pairs(parts: Iterable[TokenPairs]) -> TokenPairs:
    """Concatenate one or more arrays of token pairs."""
    contexts, targets = zip(*parts, strict=True)
    return TokenPairs(np.concatenate(contexts), np.concatenate(targets))


def compute_baselines(train: TokenPairs, validation: TokenPairs, vocab_size: int) -> Baselines:
    """Return the entropy of the validation targets, and their loss under a bigram model of `train`."""
    token_shares = np.bincount(validation.target, minlength=vocab_size) / len(validation.target)
    # A token that does not occur adds nothing to the entropy. It is left out, because the logarithm of 0 is infinite.
    frequencies = token_shares[token_shares > 0]
    return Baselines(
        unigram_entropy=float(-(frequencies * np.log(frequencies)).sum()),
        bigram=_bigram_loss(train, validation, vocab_size),
        bigram_tokens=len(train.context),
    )


def _bigram_loss(train: TokenPairs, validation: TokenPairs, vocab_size: int) -> float:
    """Return the cross-entropy in nats per token of a bigram model of `train` with Witten-Bell smoothing.

    p(b|a) = (c(ab) + t(a) p(b)) / (c(a) + t(a)), where c counts occurrences in training, t(a) is the number of
    different successors of a, and p(b) is the add-one unigram probability.
    """
    pair_keys, pair_counts = _count_keys(_pair_keys(train, vocab_size))
    context_counts = np.bincount(train.context, minlength=vocab_size)
    successors = np.bincount(pair_keys // vocab_size, minlength=vocab_size)
    unigram = (np.bincount(train.target, minlength=vocab_size) + 1) / (len(train.target) + vocab_size)
    validation_keys = _pair_keys(validation, vocab_size)
    # The added key is above all others, so that each index of the search exists, even if training has no pairs.
    indices = np.searchsorted(pair_keys, validation_keys)
    is_known = np.append(pair_keys, vocab_size**2)[indices] == validation_keys
    joint_counts = np.where(is_known, np.append(pair_counts, 0)[indices], 0)
    # A context that does not occur in training has no successors, so the probability would be 0 / 0. With at least 1
    # successor, the probability is that of the unigram model.
    back_off = np.maximum(successors[validation.context], 1)
    probability = (joint_counts + back_off * unigram[validation.target]) / (
        context_counts[validation.context] + back_off
    )
    return float(-np.log(probability).mean())


def _pair_keys(pairs: TokenPairs, vocab_size: int) -> np.ndarray:
    keys = pairs.context.astype(np.int64)
    keys *= vocab_size
    keys += pairs.target
    return keys


def _count_keys(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct keys and their counts; `keys` is sorted in place."""
    # np.unique with counts would do the same in three times the memory.
    keys.sort()
    # Without keys, nothing starts.
    starts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1])[: len(keys)])
    return keys[starts], np.diff(starts, append=len(keys))
