"""Text of unknown domain, predicted by all experts of a DEMix model together (arXiv 2108.05036, section 4).

The prediction of a token is the mean of the experts' predictions, weighted by the posterior probability of their
domains after the tokens before it. The priors at the start of a sample are

    uniform    the same for all domains
    updating   an exponential moving average of the posteriors of the samples before it
    cached     the mean posterior of other samples of the same text: samples with even numbers have the mean of the
               first `CACHED_SAMPLES` samples with odd numbers, and the reverse

The product of the predictions of a sample's tokens equals the mean of the experts' probabilities of the sample,
weighted by the prior. So its loss follows from the experts' losses.
"""

from collections.abc import Iterable
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from mhmoe_ray.evaluate.measure import DomainSamples, MeasureSettings, sample_batches, sample_losses
from mhmoe_ray.evaluate.score import Score
from mhmoe_ray.model.decoder import Decoder

Prior = Literal["uniform", "updating", "cached"]
DECAY = 0.3
"""Factor by which prior `updating` multiplies a posterior's weight at each later sample, as in the DEMix paper."""
CACHED_SAMPLES = 100
"""Largest number of samples whose posteriors prior `cached` averages, as in the DEMix paper."""

Probabilities = NDArray[np.float64]


def mixture_losses(losses_NE: Probabilities, prior: Prior) -> Probabilities:
    """Return the loss of each sample under the mixture of all experts, in nats, (N,).

    `losses_NE` are the experts' losses, summed over a sample's targets, for samples in the order of the text.
    """
    experts = losses_NE.shape[1]
    uniform_E = np.full(experts, 1 / experts)
    if prior == "uniform":
        prior_NE = np.broadcast_to(uniform_E, losses_NE.shape)
    elif prior == "updating":
        prior_NE = _updating_priors(losses_NE)
    else:
        posterior_NE = _posterior(losses_NE, np.broadcast_to(uniform_E, losses_NE.shape))
        prior_NE = np.empty_like(losses_NE)
        for half in (0, 1):
            other_posteriors = posterior_NE[1 - half :: 2][:CACHED_SAMPLES]
            prior_NE[half::2] = other_posteriors.mean(0) if len(other_posteriors) else uniform_E
    return -_log_sum_exp(np.log(_positive(prior_NE)) - losses_NE)


def _updating_priors(losses_NE: Probabilities) -> Probabilities:
    """Return the mean of the posteriors of the samples before each one, weighted by `DECAY`; the first is uniform."""
    prior_NE = np.empty_like(losses_NE)
    average_E, weight = np.zeros(losses_NE.shape[1]), 0.0
    for n, losses_E in enumerate(losses_NE):
        prior_NE[n] = average_E / weight if weight else 1 / len(losses_E)
        posterior_E = _posterior(losses_E[None], prior_NE[n : n + 1])[0]
        average_E, weight = DECAY * (average_E + posterior_E), DECAY * (weight + 1)
    return prior_NE


def _posterior(losses_NE: Probabilities, prior_NE: Probabilities) -> Probabilities:
    """Return the posteriors of the domains at the end of each sample, (N, E)."""
    log_joint_NE = np.log(_positive(prior_NE)) - losses_NE
    posterior_NE: Probabilities = np.exp(log_joint_NE - _log_sum_exp(log_joint_NE)[:, None])
    return posterior_NE


def _positive(probabilities: Probabilities) -> Probabilities:
    """Raise probabilities to the smallest normal float64, so that their logarithms are finite."""
    return np.maximum(probabilities, np.finfo(np.float64).tiny)


def _log_sum_exp(values_NE: Probabilities) -> Probabilities:
    largest_N = values_NE.max(1)
    result: Probabilities = largest_N + np.log(np.exp(values_NE - largest_N[:, None]).sum(1))
    return result


@torch.inference_mode()
def measure_mixture(
    model: Decoder,
    samples: Iterable[DomainSamples],
    widths: np.ndarray,
    prior: Prior,
    settings: MeasureSettings,
) -> dict[str, Score]:
    """Run all experts of a model with router `domain` over samples; return the scores of their mixture by domain.

    The priors treat each domain as a text of its own. The other arguments are those of `measure_samples`.
    """
    assert model.spec.moe is not None
    scores: dict[str, Score] = {}
    for domain_samples in samples:
        domain, sample_count, loss_rows = domain_samples.domain, len(domain_samples.tokens), []
        score = scores.setdefault(domain, Score())
        for batch in sample_batches(model, domain_samples, settings):
            expert_losses = [
                sample_losses(model, batch, expert, settings).cpu() for expert in range(model.spec.moe.experts)
            ]
            loss_rows += torch.stack(expert_losses, dim=1).tolist()
            score += batch.score(widths, 0.0)
            settings.on_progress(domain, len(loss_rows), sample_count)
        scores[domain] = score + Score(nats=float(mixture_losses(np.array(loss_rows), prior).sum()))
    return scores
