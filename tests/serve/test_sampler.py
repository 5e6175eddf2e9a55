import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mhmoe_ray.serve.engine import Sampling, sampler
from mhmoe_ray.serve.engine.sampler import Chooser, scored

logits = st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=12)


def choose(chooser, logits_V):
    return chooser.choose(logits_V, int(logits_V.argmax()))


def nucleus(probabilities, top_p):
    """Return the smallest set of most likely tokens that holds top_p of the mass, found one token after another."""
    kept, mass = [], 0.0
    for token in sorted(range(len(probabilities)), key=lambda t: -probabilities[t]):
        if mass >= top_p:
            break
        kept.append(token)
        mass += probabilities[token]
    return kept


@given(logits)
def test_temperature_zero_is_the_most_likely(values):
    assert values[choose(Chooser(Sampling(1, temperature=0)), torch.tensor(values))] == max(values)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.9), (1.0, 0.6), (1.0, 1e-9)])
def test_frequencies_follow_the_distribution(temperature, top_p):
    values = torch.tensor([1.0, 0.2, -0.5, 2.0, 0.0, -3.0])
    probabilities = (values.double() / temperature).softmax(0).tolist()
    kept = nucleus(probabilities, top_p)
    mass = sum(probabilities[t] for t in kept)
    chooser, draws = Chooser(Sampling(1, temperature, top_p=top_p, seed=1)), 4000
    counts = torch.zeros(6)
    for _ in range(draws):
        counts[choose(chooser, values)] += 1
    for token, p in enumerate(probabilities):
        expected = p / mass if token in kept else 0.0
        # Five standard deviations of a binomial share.
        assert abs(counts[token] / draws - expected) <= 5 * (expected * (1 - expected) / draws) ** 0.5


@given(logits, st.floats(min_value=5e-324, max_value=2), st.floats(min_value=5e-324, max_value=1), st.integers(0, 99))
def test_no_allowed_temperature_or_top_p_fails(values, temperature, top_p, seed):
    token = choose(Chooser(Sampling(1, temperature, top_p=top_p, seed=seed)), torch.tensor(values))
    assert 0 <= token < len(values)


def drawn(sampling, values, draws=300):
    chooser = Chooser(sampling)
    return [choose(chooser, torch.tensor(values)) for _ in range(draws)]


@settings(max_examples=300)
@given(
    seed=st.integers(0, 2**20), tokens=st.integers(1, 700), kinds=st.sampled_from([2, 20, 10**6]),
    top_k=st.sampled_from([0, 1, 3, 300]), top_p=st.floats(0.01, 0.99), min_p=st.sampled_from([0.0, 1e-4, 0.1]),
    front=st.sampled_from([1, 7, 256]),
)  # fmt: skip
def test_a_draw_is_among_those_that_sorting_all_of_them_leaves(seed, tokens, kinds, top_k, top_p, min_p, front):
    """The draw is right however many tokens are looked at first, and also where many are equally likely."""
    logits_V = torch.randint(kinds, (tokens,), generator=torch.Generator().manual_seed(seed)) * (12.0 / kinds)
    probability_V = logits_V.double().softmax(-1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "FRONT", front)
        found = sampler._among(probability_V, Sampling(1, 1, top_k=top_k, top_p=top_p, min_p=min_p)).tolist()
    order = probability_V.sort(descending=True, stable=True).indices.tolist()
    left = [t for t in order if probability_V[t] >= min_p * probability_V[order[0]]][: top_k or None]
    mass = probability_V[left].sum()
    least, most = (
        {left[i] for i in nucleus((probability_V[left] / mass).tolist(), top_p + slack)} for slack in (-1e-9, 1e-9)
    )
    assert least <= set(found) <= most
    assert found == sorted(found)


def test_cuts_leave_the_likeliest():
    values = [2.0, 1.0, 3.0, 0.0, -1.0]
    assert set(drawn(Sampling(1, 2.0, top_k=2, seed=0), values)) == {0, 2}
    # exp(-2) of the most likely: as likely as token 1 is
    assert set(drawn(Sampling(1, 1.0, min_p=0.13, seed=0), values)) == {0, 1, 2}
    # Of the two that top-k leaves, the first alone has the mass.
    assert set(drawn(Sampling(1, 1.0, top_k=2, top_p=0.7, seed=0), values)) == {2}


def test_penalties_and_biases_move_logits():
    assert drawn(Sampling(9, 0, frequency_penalty=0.4), [1.0, 0.9, -9.0], 5) == [0, 1, 0, 1, 0]
    assert drawn(Sampling(9, 0, presence_penalty=0.4), [1.0, 0.9, -9.0], 4) == [0, 1, 0, 0]
    assert drawn(Sampling(9, 0, logit_bias={2: 100.0}), [1.0, 0.9, -9.0], 2) == [2, 2]
    assert drawn(Sampling(9, 0, logit_bias={0: -100.0}), [1.0, 0.9, -9.0], 2) == [1, 1]


def test_equal_seeds_draw_alike_and_negative_ones_are_seeds_too():
    values = [0.0] * 50
    assert drawn(Sampling(1, seed=-3), values) == drawn(Sampling(1, seed=-3), values)
    assert drawn(Sampling(1, seed=-3), values) != drawn(Sampling(1, seed=3), values)
    assert drawn(Sampling(1), values) != drawn(Sampling(1), values)


def test_scores_are_log_probabilities_and_the_likeliest():
    logits_RV = torch.tensor([[0.0, 1.0, 2.0], [5.0, 1.0, 0.0]])
    first, second = scored(logits_RV, [0, 0], 2)
    logprob_RV = logits_RV.log_softmax(-1)
    assert first.logprob == pytest.approx(float(logprob_RV[0, 0]))
    assert [token for token, _ in first.alternatives] == [2, 1]
    assert [token for token, _ in second.alternatives] == [0, 1]
    assert scored(logits_RV[:1], [1], 0)[0].alternatives == ()
