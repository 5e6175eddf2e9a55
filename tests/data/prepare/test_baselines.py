import numpy as np
import pytest

from mhmoe_ray.data.prepare.baselines import compute_baselines, join_pairs, token_pairs
from mhmoe_ray.data.shards.columns import TARGETS, TOKENS, conversation_dtype


def test_baselines_equal_counting_by_hand():
    train = np.array([[0, 1, 2, 1], [1, 0, 1, 1]])
    validation = np.array([[0, 1, 1, 9], [3, 2, 2, 2]])
    baselines = compute_baselines(token_pairs(train, 9), token_pairs(validation, 9), vocab_size=4)
    # The targets in the validation samples are 1, 1, 2, 2 and 2. The token 9 is padding.
    assert baselines.unigram_entropy == pytest.approx(-(0.4 * np.log(0.4) + 0.6 * np.log(0.6)))
    # The pairs in the training samples are 01, 12, 21, 10, 01 and 11. The successors of 0 are 1; those of 1 are 2, 0
    # and 1; that of 2 is 1; and 3 does not occur.
    unigram = (np.array([1, 4, 1, 0]) + 1) / 10
    expected_probabilities = [
        (2 + 1 * unigram[1]) / 3,  # the pair 01
        (1 + 3 * unigram[1]) / 6,  # the pair 11
        (0 + 1 * unigram[2]) / 1,  # the pair 32, from token frequencies alone, because 3 has no successors
        (0 + 1 * unigram[2]) / 2,  # the pair 22, which occurs twice
        (0 + 1 * unigram[2]) / 2,
    ]
    assert baselines.bigram == pytest.approx(-np.log(expected_probabilities).mean())
    assert baselines.bigram_tokens == 6


def test_bigram_model_is_a_distribution():
    generator = np.random.default_rng(1)
    train = generator.integers(0, 6, (20, 5))
    all_pairs = np.array([[a, b] for a in range(7) for b in range(7)])
    losses = [compute_baselines(token_pairs(train, 99), token_pairs(pair[None], 99), 7).bigram for pair in all_pairs]
    assert np.exp(-np.array(losses)).reshape(7, 7).sum(1) == pytest.approx(np.ones(7))


def test_baselines_ignore_padding_of_training_samples():
    padded, unpadded = np.array([[0, 1, 2, 9, 9], [3, 1, 1, 0, 2]]), np.array([[3, 1, 1, 0, 2]])
    validation = token_pairs(np.array([[0, 1, 1, 2, 3]]), 9)
    baselines = compute_baselines(token_pairs(padded, 9), validation, 4)
    assert baselines.bigram_tokens == 6
    assert baselines != compute_baselines(token_pairs(unpadded, 9), validation, 4)


def test_baselines_of_conversations_are_those_of_their_targets():
    """A token that is no target can be the first of a pair of tokens, but not the second."""
    rows = np.zeros((2, 4), conversation_dtype(2))
    rows[TOKENS], rows[TARGETS] = [[0, 1, 2, 1], [3, 1, 9, 9]], [[True, False, True, True], [False, True, False, False]]
    pairs = token_pairs(rows, 9)
    assert (pairs.context.tolist(), pairs.target.tolist()) == ([1, 2, 3], [2, 1, 1])


def test_join_pairs_counts_domains_together():
    first_samples, second_samples = np.array([[0, 1, 2, 1]]), np.array([[1, 0, 1, 1]])
    validation = token_pairs(np.array([[0, 1, 1, 9]]), 9)
    joined_pairs = join_pairs([token_pairs(first_samples, 9), token_pairs(second_samples, 9)])
    assert compute_baselines(joined_pairs, validation, 4) == compute_baselines(
        token_pairs(np.vstack([first_samples, second_samples]), 9), validation, 4
    )


def test_baselines_without_training_text_are_those_of_equally_likely_tokens():
    """The rows of an encoder may all have images alone, while held-out ones have texts."""
    without_text = token_pairs(np.full((3, 4), 9), 9)
    baselines = compute_baselines(without_text, token_pairs(np.array([[0, 1, 1, 9], [3, 2, 2, 2]]), 9), vocab_size=4)
    assert baselines.bigram == pytest.approx(np.log(4))
    assert baselines.bigram_tokens == 0
