"""Sampling: choose the next token from the model's logits."""

import torch
from torch import Tensor

from mhmoe_ray.serve.engine.request import Sampling, Scored

FRONT = 1024
"""Number of most likely tokens in which a nucleus (top-p or min-p) is searched first."""


class Chooser:
    """The sampler of one answer: its random generator and the tokens it has chosen."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._random = torch.Generator()
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(sampling.seed % 2**64)
        penalties = sampling.presence_penalty or sampling.frequency_penalty
        self._plain = sampling.temperature == 0 and not (penalties or sampling.logit_bias)
        self._times: dict[int, int] = {}
        """Number of times that each token occurs in the answer."""

    def choose(self, logits_V: Tensor, best: int) -> int:
        """Return the next token for these logits, which are in CPU memory; `best` is the token with the largest
        logit."""
        sampling = self._sampling
        if self._plain:
            return best
        logits_V = self._moved(logits_V)
        token = int(logits_V.argmax()) if sampling.temperature == 0 else self._drawn(logits_V.double())
        if sampling.presence_penalty or sampling.frequency_penalty:
            self._times[token] = self._times.get(token, 0) + 1
        return token

    def _moved(self, logits_V: Tensor) -> Tensor:
        """Return the logits after penalties and biases."""
        sampling = self._sampling
        if not self._times and not sampling.logit_bias:
            return logits_V
        logits_V = logits_V.clone()
        for token, times in self._times.items():
            logits_V[token] -= sampling.presence_penalty + times * sampling.frequency_penalty
        for token, bias in sampling.logit_bias.items():
            logits_V[token] += bias
        return logits_V

    def _drawn(self, logits_V: Tensor) -> int:
        sampling = self._sampling
        # The largest logit becomes 0 first, so that no temperature, however small, makes inf - inf.
        probability_V = ((logits_V - logits_V.max()) / sampling.temperature).softmax(-1)
        among_K = _among(probability_V, sampling)
        probability_K = probability_V if among_K is None else probability_V[among_K]
        # One number per token: a draw is a place on the line of all probabilities.
        line_K = probability_K.cumsum(-1)
        place = torch.rand((), dtype=torch.float64, generator=self._random) * line_K[-1]
        drawn = min(int(torch.searchsorted(line_K, place, right=True)), int(probability_K.nonzero()[-1]))
        return drawn if among_K is None else int(among_K[drawn])


def _among(probability_V: Tensor, sampling: Sampling) -> Tensor | None:
    """Return the tokens that a draw chooses from, ascending; None if these are all tokens.

    Sorting a large vocabulary takes longer than a step of a small model. So only the most likely tokens are sorted
    first, with all tokens as likely as the last of them; the whole vocabulary is sorted only if these do not suffice.
    """
    if not (sampling.top_k or sampling.top_p < 1 or sampling.min_p):
        return None
    most, few = float(probability_V.max()), sampling.top_k or FRONT
    for front in (few, None) if 8 * few < len(probability_V) and most > 0 else (None,):  # not where they are no numbers
        if front:
            token_F = (probability_V >= probability_V.topk(front).values[-1]).nonzero()[:, 0]
            sorted_F, order_F = probability_V[token_F].sort(descending=True, stable=True)
            token_F = token_F[order_F]
        else:
            sorted_F, token_F = probability_V.sort(descending=True, stable=True)
        cut_F = sorted_F < sampling.min_p * most
        if sampling.top_k:
            cut_F[sampling.top_k :] = True
        if sampling.top_p < 1:
            left_F = sorted_F.masked_fill(cut_F, 0)
            whole_V = left_F if sampling.top_k else probability_V.where(probability_V >= sampling.min_p * most, 0)
            left_F /= whole_V.sum()
            cut_F |= left_F.cumsum(-1) - left_F >= sampling.top_p
        if sampling.top_k or cut_F.any():  # whatever is less likely is cut, too
            break
    return token_F[~cut_F].sort().values


def scored(logits_RV: Tensor, tokens: list[int], alternatives: int) -> list[Scored]:
    """Return the score of one token per row: its log-probability and the most likely tokens of the row.

    Args:
        logits_RV: logits, one row per token.
        tokens: the chosen token of each row.
        alternatives: number of most likely tokens to return per row.
    """
    logprob_RV = logits_RV.float().log_softmax(-1)
    chosen = logprob_RV.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()
    best, token = logprob_RV.topk(alternatives, dim=-1) if alternatives else (None, None)
    tops = [
        tuple(zip(token[i].tolist(), best[i].tolist(), strict=True)) if token is not None and best is not None else ()
        for i in range(len(tokens))
    ]
    return [Scored(*found) for found in zip(tokens, chosen, tops, strict=True)]
