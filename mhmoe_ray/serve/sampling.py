"""The next token from the model's logits."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    max_tokens: int
    temperature: float = 1.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    """Tokens are drawn from the smallest set whose probabilities add up to this."""
    seed: int | None = None
    """Answers of equal seeds are equal, whatever else the process does; None draws a seed."""

    def generator(self) -> torch.Generator:
        """A source of random numbers that no other request shares."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


def choose(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token id drawn from softmax(logits / temperature), cut to its top-p set."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    # The largest logit becomes 0 first, so that no temperature, however small, makes inf - inf.
    logits_V = logits_V.double()
    probability_V = ((logits_V - logits_V.max()) / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        sorted_V, token_V = probability_V.sort(descending=True)
        before_V = sorted_V.cumsum(-1) - sorted_V
        probability_V[token_V[before_V >= sampling.top_p]] = 0
    return int(torch.multinomial(probability_V, 1, generator=generator))
