"""What counting alone predicts: the figures a validation loss is held against."""

import numpy as np

from mhmoe_ray.data.shards.manifest import Baselines


def baselines(train: np.ndarray, validation: np.ndarray, vocab_size: int, padding: int) -> Baselines:
    """Unigram entropy of the validation targets, and a bigram model of training tokens on them.

    Args:
        train: (samples, T + 1) token ids; the pairs within a sample are counted.
        validation: (samples, T + 1) token ids, where `padding` marks targets that do not count.
        vocab_size: V; every id but padding is below it.
        padding: the marker.
    """
    left, right = (a.astype(np.int64).ravel() for a in (validation[:, :-1], validation[:, 1:]))
    kept = right != padding
    left, right = left[kept], right[kept]
    frequency = np.bincount(right, minlength=vocab_size) / len(right)
    seen = frequency[frequency > 0]
    first, second = (a.astype(np.int64).ravel() for a in (train[:, :-1], train[:, 1:]))
    return Baselines(
        unigram_entropy=float(-(seen * np.log(seen)).sum()),
        bigram=_bigram(first, second, left, right, vocab_size),
        bigram_tokens=len(first),
    )


def _bigram(first: np.ndarray, second: np.ndarray, left: np.ndarray, right: np.ndarray, vocab_size: int) -> float:
    """Witten-Bell: p(b|a) = (c(ab) + t(a) p(b)) / (c(a) + t(a)), where t(a) counts the different successors of a and
    p(b) is the add-one unigram."""
    pairs, count = np.unique(first * vocab_size + second, return_counts=True)
    total = np.bincount(first, minlength=vocab_size)
    successors = np.bincount(pairs // vocab_size, minlength=vocab_size)
    unigram = (np.bincount(second, minlength=vocab_size) + 1) / (len(second) + vocab_size)
    wanted = left * vocab_size + right
    place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    joint = np.where(pairs[place] == wanted, count[place], 0)
    # A token never seen on the left has no successors: back off to the unigram alone.
    back_off = np.maximum(successors[left], 1)
    probability = (joint + back_off * unigram[right]) / (total[left] + back_off)
    return float(-np.log(probability).mean())
