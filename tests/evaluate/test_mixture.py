"""Tests of the Bayes mixture of a DEMix model's experts."""

import numpy as np
import pytest
import torch

from mhmoe_ray.errors import DataError
from mhmoe_ray.evaluate.measure import DomainSamples, MeasureSettings, measure_samples
from mhmoe_ray.evaluate.mixture import DECAY, measure_mixture, mixture_losses
from mhmoe_ray.model.loss import token_losses
from tests.support.decoders import make_domain_model

SETTINGS = MeasureSettings(batch_size=3, start_token=0, use_bfloat16=False, on_progress=lambda *_: None)
GENERATOR = np.random.default_rng(0)


def mixture_token_by_token(losses_TE, prior_E):
    """Return a sample's loss under a mixture that averages the experts' probabilities of each token, and the posterior.

    The weights of a token's average are the experts' posterior probabilities after the tokens before it.
    """
    weight_E, loss = np.array(prior_E), 0.0
    for loss_E in losses_TE:
        probability_E = np.exp(-loss_E)
        loss -= np.log((weight_E * probability_E).sum() / weight_E.sum())
        weight_E = weight_E * probability_E
    return loss, weight_E / weight_E.sum()


def expected_losses(losses_NTE, prior):
    """Return the mixture's loss of each sample by its definition, token by token, for the kind of prior `prior`."""
    samples, _, experts = losses_NTE.shape
    uniform_E = np.full(experts, 1 / experts)
    if prior == "uniform":
        return [mixture_token_by_token(sample, uniform_E)[0] for sample in losses_NTE]
    if prior == "cached":
        posteriors = np.array([mixture_token_by_token(sample, uniform_E)[1] for sample in losses_NTE])
        halves = [posteriors[1::2].mean(0), posteriors[::2].mean(0)]
        return [mixture_token_by_token(sample, halves[n % 2])[0] for n, sample in enumerate(losses_NTE)]
    losses, posteriors = [], []
    for n in range(samples):
        weights = [DECAY ** (n - i) for i in range(n)]
        prior_E = np.average(posteriors, axis=0, weights=weights) if n else uniform_E
        loss, posterior_E = mixture_token_by_token(losses_NTE[n], prior_E)
        losses.append(loss)
        posteriors.append(posterior_E)
    return losses


@pytest.mark.parametrize("prior", ["uniform", "updating", "cached"])
def test_the_loss_of_a_sample_is_that_of_the_mixture_token_by_token(prior):
    losses_NTE = GENERATOR.gamma(2, 0.7, (9, 12, 3))
    actual = mixture_losses(losses_NTE.sum(1), prior)
    assert actual == pytest.approx(expected_losses(losses_NTE, prior), rel=1e-10)


@pytest.mark.parametrize("prior", ["uniform", "updating", "cached"])
def test_hopeless_experts_cost_at_most_their_prior(prior):
    """Losses of thousands of nats neither overflow nor make a probability zero."""
    losses_NE = np.tile([100.0, 5000.0, 9000.0], (6, 1))
    losses = mixture_losses(losses_NE, prior)
    assert np.isfinite(losses).all()
    assert ((losses >= 100 - 1e-9) & (losses <= 100 + np.log(3) + 1e-9)).all()
    if prior != "uniform":
        assert losses[-1] == pytest.approx(100, abs=1e-6)


def domain_samples(domain, seed):
    tokens = np.random.default_rng(seed).integers(0, 300, (7, 13))
    mask = np.ones((7, 12), bool)
    mask[-1, 5:] = False
    return DomainSamples(domain, tokens, mask)


def test_a_known_domain_is_computed_by_its_expert_and_an_unknown_one_by_all():
    model = make_domain_model().eval()
    widths = np.ones(300, np.int64)
    scores, routes = measure_samples(
        model, [domain_samples("web/en", 0), domain_samples("code/py", 1)], widths, SETTINGS
    )
    for name, expert, seed in (("web/en", 0, 0), ("code/py", 1, 1)):
        samples = domain_samples(name, seed)
        tokens = torch.from_numpy(samples.tokens)
        logits = model(tokens[:, :-1], domain_B=torch.full((7,), expert)).logits_BTV
        loss = (token_losses(logits, tokens[:, 1:]) * torch.from_numpy(samples.target_mask)).sum().item()
        assert scores[name].nats == pytest.approx(loss, rel=1e-5)
        assert scores[name].tokens == 6 * 12 + 5
        assert [count > 0 for count in routes[name].counts[0]] == [e == expert for e in range(3)]
    samples = domain_samples("books/a", 2)
    mixture = measure_mixture(model, [samples], widths, "uniform", SETTINGS)["books/a"]
    tokens, mask = torch.from_numpy(samples.tokens), torch.from_numpy(samples.target_mask)
    expert_losses = []
    for expert in range(3):
        logits = model(tokens[:, :-1], domain_B=torch.full((7,), expert)).logits_BTV
        expert_losses.append((token_losses(logits, tokens[:, 1:]) * mask).sum(1).double())
    losses_NE = torch.stack(expert_losses, 1).detach().numpy()
    # With a uniform prior, a sample's probability is the mean of the probabilities that the experts give it.
    expected = (np.log(3) - np.logaddexp.reduce(-losses_NE, axis=1)).sum()
    assert mixture.nats == pytest.approx(expected, rel=1e-5)
    assert (mixture.tokens, mixture.text_bytes) == (6 * 12 + 5, 6 * 12 + 5)


def test_a_domain_without_an_expert_is_named():
    with pytest.raises(DataError, match="domain books/a: the model has no expert for it; give a prior"):
        measure_samples(make_domain_model().eval(), [domain_samples("books/a", 0)], np.ones(300, np.int64), SETTINGS)
