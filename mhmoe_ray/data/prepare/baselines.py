"""Baselines that need only counting: the unigram and bigram figures that a validation loss is compared with."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from mhmoe_ray.data.shards.files import Samples
from mhmoe_ray.data.shards.manifest import Baselines


class Pairs(NamedTuple):
    """Pairs of neighbouring tokens (left, right), each (n,) uint32."""

    left: np.ndarray
    right: np.ndarray


def pairs(samples: Samples, padding: int) -> Pairs:
    """Return each target that counts, with the token before it, of samples (n, T + 1)."""
    counts = samples[:, 1:] != padding
    return Pairs(samples[:, :-1][counts].astype(np.uint32), samples[:, 1:][counts].astype(np.uint32))


def joined(parts: Iterable[Pairs]) -> Pairs:
    left, right = zip(*parts, strict=True)
    return Pairs(np.concatenate(left), np.concatenate(right))


def baselines(train: Pairs, validation: Pairs, vocab_size: int) -> Baselines:
    """Return the unigram entropy of the validation targets, and the loss of a bigram model of training tokens on them.

    Args:
        train: the pairs of training samples.
        validation: the pairs of validation samples.
        vocab_size: V; every token id is below it.
    """
    frequency = np.bincount(validation.right, minlength=vocab_size) / len(validation.right)
    seen = frequency[frequency > 0]
    return Baselines(
        unigram_entropy=float(-(seen * np.log(seen)).sum()),
        bigram=_bigram(train, validation, vocab_size),
        bigram_tokens=len(train.left),
    )


def _bigram(train: Pairs, validation: Pairs, vocab_size: int) -> float:
    """Return the cross-entropy of the validation pairs under a bigram model with Witten-Bell smoothing, in nats per
    token.

    p(b|a) = (c(ab) + t(a) p(b)) / (c(a) + t(a)), where t(a) is the number of different successors of a and p(b) is the
    add-one unigram probability.
    """
    both, count = _counted(_keys(train, vocab_size))
    total = np.bincount(train.left, minlength=vocab_size)
    successors = np.bincount(both // vocab_size, minlength=vocab_size)
    unigram = (np.bincount(train.right, minlength=vocab_size) + 1) / (len(train.right) + vocab_size)
    wanted = _keys(validation, vocab_size)
    place = np.minimum(np.searchsorted(both, wanted), len(both) - 1)
    joint = np.where(both[place] == wanted, count[place], 0)
    # A token never seen on the left has no successors: back off to the unigram alone.
    back_off = np.maximum(successors[validation.left], 1)
    probability = (joint + back_off * unigram[validation.right]) / (total[validation.left] + back_off)
    return float(-np.log(probability).mean())


def _keys(of: Pairs, vocab_size: int) -> np.ndarray:
    keys = of.left.astype(np.int64)
    keys *= vocab_size
    keys += of.right
    return keys


def _counted(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the different keys in ascending order and their counts; sorts `keys` in place.

    It is np.unique with counts, which would take three times the memory.
    """
    keys.sort()
    first = np.flatnonzero(np.append(True, keys[1:] != keys[:-1]))
    return keys[first], np.diff(first, append=len(keys))
