"""What counting alone predicts: the figures a validation loss is held against."""

from typing import NamedTuple

import numpy as np

from mhmoe_ray.data.shards.files import Samples
from mhmoe_ray.data.shards.manifest import Baselines


class Pairs(NamedTuple):
    """Neighbouring tokens (left, right), each (n,) int64."""

    left: np.ndarray
    right: np.ndarray


def pairs(samples: Samples, padding: int) -> Pairs:
    """Of samples (n, T + 1): each target that counts, with the token before it."""
    counts = samples[:, 1:] != padding
    return Pairs(samples[:, :-1][counts].astype(np.int64), samples[:, 1:][counts].astype(np.int64))


def baselines(train: Pairs, validation: Pairs, vocab_size: int) -> Baselines:
    """Unigram entropy of the validation targets, and a bigram model of training tokens on them.

    Args:
        train: of training samples.
        validation: of validation samples.
        vocab_size: V; every id is below it.
    """
    frequency = np.bincount(validation.right, minlength=vocab_size) / len(validation.right)
    seen = frequency[frequency > 0]
    return Baselines(
        unigram_entropy=float(-(seen * np.log(seen)).sum()),
        bigram=_bigram(train, validation, vocab_size),
        bigram_tokens=len(train.left),
    )


def _bigram(train: Pairs, validation: Pairs, vocab_size: int) -> float:
    """Witten-Bell: p(b|a) = (c(ab) + t(a) p(b)) / (c(a) + t(a)), where t(a) counts the different successors of a and
    p(b) is the add-one unigram."""
    both, count = np.unique(train.left * vocab_size + train.right, return_counts=True)
    total = np.bincount(train.left, minlength=vocab_size)
    successors = np.bincount(both // vocab_size, minlength=vocab_size)
    unigram = (np.bincount(train.right, minlength=vocab_size) + 1) / (len(train.right) + vocab_size)
    wanted = validation.left * vocab_size + validation.right
    place = np.minimum(np.searchsorted(both, wanted), len(both) - 1)
    joint = np.where(both[place] == wanted, count[place], 0)
    # A token never seen on the left has no successors: back off to the unigram alone.
    back_off = np.maximum(successors[validation.left], 1)
    probability = (joint + back_off * unigram[validation.right]) / (total[validation.left] + back_off)
    return float(-np.log(probability).mean())
