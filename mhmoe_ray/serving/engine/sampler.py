"""The sampler: it draws the next token from the model's logits, and scores tokens."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from mhmoe_ray.serving.engine.request import ScoredToken
from mhmoe_ray.serving.sampling import SamplingParams

NUCLEUS_CANDIDATES = 1024
"""Number of most likely tokens that are sorted first; if top-p and min-p keep all of them, all tokens are sorted."""


class Sampler:
    """The sampler of one answer, with its own random generator and the tokens so far."""

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int] = (), end_tokens: Sequence[int] = ()) -> None:
        self._params, self._end_tokens = params, list(end_tokens)
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            # The seed of a request may be negative. Seeds of its further answers (`n` > 1) may have more than the 64
            # bits that torch takes.
            self._generator.manual_seed(params.seed % 2**64)
        self._has_penalties = params.presence_penalty or params.frequency_penalty
        self._has_factor = params.repetition_penalty != 1
        self._adjusts_logits = params.logit_bias or self._has_penalties or self._has_factor or params.min_tokens
        self._prompt_ids = torch.tensor(prompt_ids if self._has_factor else (), dtype=torch.long)
        self._answer_ids: list[int] = []

    def sample(self, logits_V: Tensor, best_token: int) -> int:
        """Choose the next token of the answer by the sampling parameters; `best_token` has the largest logit."""
        if self._adjusts_logits:
            logits_V = self._adjust_logits(logits_V.clone())
        # The engine has computed the largest logits of all rows of a step together, so a greedy answer costs nothing
        # here.
        elif self._params.temperature == 0:
            return best_token
        token = int(logits_V.argmax()) if self._params.temperature == 0 else self._draw_token(logits_V.double())
        self._answer_ids.append(token)
        return token

    def _adjust_logits(self, logits_V: Tensor) -> Tensor:
        """Apply biases, penalties and the smallest number of tokens to the logits in place, and return them."""
        params = self._params
        for token, bias in params.logit_bias.items():
            logits_V[token] += bias
        if self._has_factor:
            token_S = torch.cat([self._prompt_ids, torch.tensor(self._answer_ids, dtype=torch.long)])
            # A prompt of token ids may have tokens of the model that the tokenizer lacks, and which have no logit here.
            token_S = token_S[token_S < len(logits_V)]
            logits_S, factor = logits_V[token_S], params.repetition_penalty
            logits_V[token_S] = torch.where(logits_S < 0, logits_S * factor, logits_S / factor)
        if self._has_penalties:
            for token, count in Counter(self._answer_ids).items():
                logits_V[token] -= params.presence_penalty + count * params.frequency_penalty
        if len(self._answer_ids) < params.min_tokens:
            logits_V[self._end_tokens] = -torch.inf
        return logits_V

    def _draw_token(self, logits_V: Tensor) -> int:
        """Draw a token at the request's temperature, from those that top-k, top-p and min-p leave."""
        params = self._params
        # The logits are shifted so that the largest one is 0. Otherwise a very small temperature could make them
        # infinite, and softmax would compute inf - inf.
        probability_V = ((logits_V - logits_V.max()) / params.temperature).softmax(-1)
        candidate_K = _candidate_tokens(probability_V, params)
        probability_K = probability_V if candidate_K is None else probability_V[candidate_K]
        # This is inverse transform sampling, which needs one random number per draw, whatever the vocabulary's size.
        cumulative_K = probability_K.cumsum(-1)
        point = torch.rand((), dtype=torch.float64, generator=self._generator) * cumulative_K[-1]
        # Rounding may put the point at the very end, so the index is at most that of the last token with a probability
        # above 0.
        index = min(int(torch.searchsorted(cumulative_K, point, right=True)), int(probability_K.nonzero()[-1]))
        return index if candidate_K is None else int(candidate_K[index])


def _candidate_tokens(probability_V: Tensor, params: SamplingParams) -> Tensor | None:
    """Return the tokens that top-k, top-p and min-p leave, in ascending order; None if they leave all tokens."""
    if not (params.top_k or params.top_p < 1 or params.min_p):
        return None
    top_probability, candidate_count = float(probability_V.max()), params.top_k or NUCLEUS_CANDIDATES
    # Sorting a large vocabulary takes longer than a step of a small model. So the most likely tokens are sorted first,
    # and the whole vocabulary only if they do not suffice. If probabilities are NaN, `top_probability > 0` is false,
    # and the whole vocabulary is sorted.
    for limit in (
        (candidate_count, None) if 8 * candidate_count < len(probability_V) and top_probability > 0 else (None,)
    ):
        if limit:
            # Tokens as likely as the last candidate are candidates too, so that ties are broken as in a full sort.
            token_F = (probability_V >= probability_V.topk(limit).values[-1]).nonzero()[:, 0]
            sorted_F, order_F = probability_V[token_F].sort(descending=True, stable=True)
            token_F = token_F[order_F]
        else:
            sorted_F, token_F = probability_V.sort(descending=True, stable=True)
        cut_F = sorted_F < params.min_p * top_probability
        if params.top_k:
            cut_F[params.top_k :] = True
        if params.top_p < 1:
            remaining_F = sorted_F.masked_fill(cut_F, 0)
            allowed_V = (
                remaining_F if params.top_k else probability_V.where(probability_V >= params.min_p * top_probability, 0)
            )
            # Top-p is a share of the probability that top-k and min-p leave.
            remaining_F /= allowed_V.sum()
            cut_F |= remaining_F.cumsum(-1) - remaining_F >= params.top_p
        # Once a candidate is cut, all less likely tokens are cut too, so the candidates suffice.
        if params.top_k or cut_F.any():
            break
    return token_F[~cut_F].sort().values


def score_tokens(logits_RV: Tensor, tokens: list[int], alternatives: int) -> list[ScoredToken]:
    """Return the score of one token per row of logits: its log-probability, and the row's likeliest tokens with theirs.

    The logits are those before temperature, penalties and biases.
    """
    logprob_RV = logits_RV.float().log_softmax(-1)
    token_logprobs = logprob_RV.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()
    top_logprob_RK, top_token_RK = logprob_RV.topk(alternatives, dim=-1) if alternatives else (None, None)
    alternatives_R = [
        tuple(zip(top_token_RK[i].tolist(), top_logprob_RK[i].tolist(), strict=True))
        if top_token_RK is not None and top_logprob_RK is not None
        else ()
        for i in range(len(tokens))
    ]
    return [ScoredToken(*fields) for fields in zip(tokens, token_logprobs, alternatives_R, strict=True)]
