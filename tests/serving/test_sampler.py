import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from mhmoe_ray.serving.engine import SamplingParams, sampler
from mhmoe_ray.serving.engine.sampler import Sampler, score_tokens

logits = st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=12)


def sample_token(token_sampler, logits_V):
    return token_sampler.sample(logits_V, int(logits_V.argmax()))


def nucleus(probabilities, top_p):
    """Return the fewest most likely tokens whose probabilities add up to `top_p`, computed token by token."""
    nucleus_tokens, mass = [], 0.0
    for token in sorted(range(len(probabilities)), key=lambda t: -probabilities[t]):
        if mass >= top_p:
            break
        nucleus_tokens.append(token)
        mass += probabilities[token]
    return nucleus_tokens


@given(logits)
def test_zero_temperature_takes_the_most_likely_token(values):
    assert values[sample_token(Sampler(SamplingParams(max_tokens=1, temperature=0)), torch.tensor(values))] == max(
        values
    )


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.9), (1.0, 0.6), (1.0, 1e-9)])
def test_sampling_frequencies_follow_the_distribution(temperature, top_p):
    values = torch.tensor([1.0, 0.2, -0.5, 2.0, 0.0, -3.0])
    probabilities = (values.double() / temperature).softmax(0).tolist()
    nucleus_tokens = nucleus(probabilities, top_p)
    mass = sum(probabilities[t] for t in nucleus_tokens)
    token_sampler, draws = Sampler(SamplingParams(max_tokens=1, temperature=temperature, top_p=top_p, seed=1)), 4000
    counts = torch.zeros(6)
    for _ in range(draws):
        counts[sample_token(token_sampler, values)] += 1
    for token, p in enumerate(probabilities):
        expected = p / mass if token in nucleus_tokens else 0.0
        # The tolerance is five standard deviations of a binomial share.
        assert abs(counts[token] / draws - expected) <= 5 * (expected * (1 - expected) / draws) ** 0.5


@given(logits, st.floats(min_value=5e-324, max_value=2), st.floats(min_value=5e-324, max_value=1), st.integers(0, 99))
def test_every_allowed_temperature_and_top_p_gives_a_token(values, temperature, top_p, seed):
    token = sample_token(
        Sampler(SamplingParams(max_tokens=1, temperature=temperature, top_p=top_p, seed=seed)), torch.tensor(values)
    )
    assert 0 <= token < len(values)


def draw_tokens(params, values, draws=300):
    token_sampler = Sampler(params)
    return [sample_token(token_sampler, torch.tensor(values)) for _ in range(draws)]


@settings(max_examples=300)
@given(
    seed=st.integers(0, 2**20), tokens=st.integers(1, 700), kinds=st.sampled_from([2, 20, 10**6]),
    top_k=st.sampled_from([0, 1, 3, 300]), top_p=st.floats(0.01, 0.99), min_p=st.sampled_from([0.0, 1e-4, 0.1]),
    front=st.sampled_from([1, 7, 256]),
)  # fmt: skip
def test_candidates_equal_those_of_a_full_sort(seed, tokens, kinds, top_k, top_p, min_p, front):
    """The candidates of top-k, top-p and min-p equal those of a full sort, whatever number (`front`) is sorted first.

    With few `kinds` of logits, many tokens are equally likely.
    """
    logits_V = torch.randint(kinds, (tokens,), generator=torch.Generator().manual_seed(seed)) * (12.0 / kinds)
    probability_V = logits_V.double().softmax(-1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "NUCLEUS_CANDIDATES", front)
        candidates = sampler._candidate_tokens(
            probability_V, SamplingParams(max_tokens=1, temperature=1, top_k=top_k, top_p=top_p, min_p=min_p)
        ).tolist()
    order = probability_V.sort(descending=True, stable=True).indices.tolist()
    remaining_tokens = [t for t in order if probability_V[t] >= min_p * probability_V[order[0]]][: top_k or None]
    mass = probability_V[remaining_tokens].sum()
    smallest_set, largest_set = (
        {remaining_tokens[i] for i in nucleus((probability_V[remaining_tokens] / mass).tolist(), top_p + slack)}
        for slack in (-1e-9, 1e-9)
    )
    assert smallest_set <= set(candidates) <= largest_set
    assert candidates == sorted(candidates)


def test_cuts_keep_the_most_likely_tokens():
    values = [2.0, 1.0, 3.0, 0.0, -1.0]
    assert set(draw_tokens(SamplingParams(max_tokens=1, temperature=2.0, top_k=2, seed=0), values)) == {0, 2}
    # Token 1 has exp(-2) = 0.135 of the largest probability, which is more than 0.13 of it, so it stays.
    assert set(draw_tokens(SamplingParams(max_tokens=1, temperature=1.0, min_p=0.13, seed=0), values)) == {0, 1, 2}
    # Of the two tokens that top-k leaves, the likelier one has more than 0.7 of their total probability, so only it
    # stays.
    assert set(draw_tokens(SamplingParams(max_tokens=1, temperature=1.0, top_k=2, top_p=0.7, seed=0), values)) == {2}


def test_penalties_and_biases_change_the_draw():
    assert draw_tokens(SamplingParams(max_tokens=9, temperature=0, frequency_penalty=0.4), [1.0, 0.9, -9.0], 5) == [
        0,
        1,
        0,
        1,
        0,
    ]
    assert draw_tokens(SamplingParams(max_tokens=9, temperature=0, presence_penalty=0.4), [1.0, 0.9, -9.0], 4) == [
        0,
        1,
        0,
        0,
    ]
    assert draw_tokens(SamplingParams(max_tokens=9, temperature=0, logit_bias={2: 100.0}), [1.0, 0.9, -9.0], 2) == [
        2,
        2,
    ]
    assert draw_tokens(SamplingParams(max_tokens=9, temperature=0, logit_bias={0: -100.0}), [1.0, 0.9, -9.0], 2) == [
        1,
        1,
    ]


def test_equal_seeds_give_equal_draws():
    values = [0.0] * 50
    assert draw_tokens(SamplingParams(max_tokens=1, seed=-3), values) == draw_tokens(
        SamplingParams(max_tokens=1, seed=-3), values
    )
    assert draw_tokens(SamplingParams(max_tokens=1, seed=-3), values) != draw_tokens(
        SamplingParams(max_tokens=1, seed=3), values
    )
    assert draw_tokens(SamplingParams(max_tokens=1), values) != draw_tokens(SamplingParams(max_tokens=1), values)


def test_scores_are_log_probabilities_with_alternatives():
    logits_RV = torch.tensor([[0.0, 1.0, 2.0], [5.0, 1.0, 0.0]])
    first_score, second_score = score_tokens(logits_RV, [0, 0], 2)
    logprob_RV = logits_RV.log_softmax(-1)
    assert first_score.logprob == pytest.approx(float(logprob_RV[0, 0]))
    assert [token for token, _ in first_score.alternatives] == [2, 1]
    assert [token for token, _ in second_score.alternatives] == [0, 1]
    assert score_tokens(logits_RV[:1], [1], 0)[0].alternatives == ()


@given(logits, st.lists(st.integers(0, 14), max_size=6), st.floats(0.01, 100))
def test_repetition_penalty_is_that_of_transformers(values, prompt, penalty):
    """The penalty is on tokens of prompt and answer; a prompt may have tokens that the tokenizer lacks."""
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    token_sampler = Sampler(SamplingParams(temperature=0, repetition_penalty=penalty), prompt)
    token_ids = [token for token in prompt if token < len(values)]
    for _ in range(4):
        expected = int(processor(torch.tensor([token_ids], dtype=torch.long), torch.tensor([values])).argmax())
        assert sample_token(token_sampler, torch.tensor(values)) == expected
        token_ids.append(expected)


def test_end_tokens_are_forbidden_up_to_the_smallest_number_of_tokens():
    values, sampling = [1.0, 9.0, 5.0], SamplingParams(min_tokens=3, logit_bias={1: 100.0}, seed=0)
    token_sampler = Sampler(sampling, end_tokens=[1, 2])
    assert [sample_token(token_sampler, torch.tensor(values)) for _ in range(5)] == [0, 0, 0, 1, 1]
