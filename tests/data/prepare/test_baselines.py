import numpy as np
import pytest

from mhmoe_ray.data.prepare.baselines import baselines, joined, pairs


def test_baselines_are_those_of_a_count_by_hand():
    train = np.array([[0, 1, 2, 1], [1, 0, 1, 1]])
    validation = np.array([[0, 1, 1, 9], [3, 2, 2, 2]])
    found = baselines(pairs(train, 9), pairs(validation, 9), vocab_size=4)
    # Targets 1 1 2 2 2.
    assert found.unigram_entropy == pytest.approx(-(0.4 * np.log(0.4) + 0.6 * np.log(0.6)))
    # Pairs 01 12 21 10 01 11: successors of 1 are 2, 0, 1; of 2 only 1; 3 is never seen.
    unigram = (np.array([1, 4, 1, 0]) + 1) / 10
    by_hand = [
        (2 + 1 * unigram[1]) / 3,  # 0 -> 1
        (1 + 3 * unigram[1]) / 6,  # 1 -> 1
        (0 + 1 * unigram[2]) / 1,  # 3 -> 2, from frequencies alone
        (0 + 1 * unigram[2]) / 2,  # 2 -> 2
        (0 + 1 * unigram[2]) / 2,
    ]
    assert found.bigram == pytest.approx(-np.log(by_hand).mean())
    assert found.bigram_tokens == 6


def test_the_bigram_model_is_a_distribution():
    rng = np.random.default_rng(1)
    train = rng.integers(0, 6, (20, 5))
    every = np.array([[a, b] for a in range(7) for b in range(7)])
    losses = [baselines(pairs(train, 99), pairs(pair[None], 99), 7).bigram for pair in every]
    assert np.exp(-np.array(losses)).reshape(7, 7).sum(1) == pytest.approx(np.ones(7))


def test_padding_of_training_samples_is_not_counted():
    padded, whole = np.array([[0, 1, 2, 9, 9], [3, 1, 1, 0, 2]]), np.array([[3, 1, 1, 0, 2]])
    validation = pairs(np.array([[0, 1, 1, 2, 3]]), 9)
    found = baselines(pairs(padded, 9), validation, 4)
    assert found.bigram_tokens == 6
    assert found != baselines(pairs(whole, 9), validation, 4)


def test_domains_count_together():
    one, other = np.array([[0, 1, 2, 1]]), np.array([[1, 0, 1, 1]])
    validation = pairs(np.array([[0, 1, 1, 9]]), 9)
    apart = joined([pairs(one, 9), pairs(other, 9)])
    assert baselines(apart, validation, 4) == baselines(pairs(np.vstack([one, other]), 9), validation, 4)
