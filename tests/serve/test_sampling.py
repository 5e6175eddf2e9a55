import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_ray.serve.sampling import Sampling, choose

logits = st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=12)


def nucleus(probabilities, top_p):
    """The smallest set of most likely tokens that holds top_p of the mass, one token after another."""
    kept, mass = [], 0.0
    for token in sorted(range(len(probabilities)), key=lambda t: -probabilities[t]):
        if mass >= top_p:
            break
        kept.append(token)
        mass += probabilities[token]
    return kept


@given(logits)
def test_temperature_zero_is_the_most_likely(values):
    assert values[choose(torch.tensor(values), Sampling(1, temperature=0), torch.Generator())] == max(values)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.9), (1.0, 0.6), (1.0, 1e-9)])
def test_frequencies_follow_the_distribution(temperature, top_p):
    values = torch.tensor([1.0, 0.2, -0.5, 2.0, 0.0, -3.0])
    probabilities = (values.double() / temperature).softmax(0).tolist()
    kept = nucleus(probabilities, top_p)
    mass = sum(probabilities[t] for t in kept)
    generator = torch.Generator().manual_seed(1)
    sampling, draws = Sampling(1, temperature, top_p), 4000
    counts = torch.zeros(6)
    for _ in range(draws):
        counts[choose(values, sampling, generator)] += 1
    for token, p in enumerate(probabilities):
        expected = p / mass if token in kept else 0.0
        # Five standard deviations of a binomial share.
        assert abs(counts[token] / draws - expected) <= 5 * (expected * (1 - expected) / draws) ** 0.5


@given(logits, st.floats(min_value=5e-324, max_value=2), st.floats(min_value=5e-324, max_value=1), st.integers(0, 99))
def test_no_allowed_temperature_or_top_p_fails(values, temperature, top_p, seed):
    sampling = Sampling(1, temperature, top_p, seed)
    token = choose(torch.tensor(values), sampling, sampling.generator())
    assert 0 <= token < len(values)
