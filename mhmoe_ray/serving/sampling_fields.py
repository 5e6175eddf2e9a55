"""Defaults, limits and texts of the sampling parameters, as plain values.

The command line makes its options from this table, so that `mhmoe --help` imports no pydantic.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

MAX_LOGPROBS = 20
"""Largest number of alternatives to report beside each token, as in OpenAI's API."""
MAX_TEMPERATURE = 2.0
"""Largest temperature in OpenAI's API and of commands."""


class SamplingField(NamedTuple):
    """Default, text and limits of a sampling parameter, under pydantic's names of limits."""

    default: Any
    text: str
    limits: Mapping[str, float] = MappingProxyType({})


SAMPLING_FIELDS = {
    "max_tokens": SamplingField(128, "Largest number of tokens of the answer.", {"ge": 1}),
    "temperature": SamplingField(1.0, "Sampling temperature; 0 takes the most likely token each time.", {"ge": 0}),
    "top_p": SamplingField(1.0, "Draw from the likeliest tokens of this total probability.", {"gt": 0, "le": 1}),
    "top_k": SamplingField(0, "Draw from this number of likeliest tokens; 0 draws from all.", {"ge": 0, "lt": 2**31}),
    "min_p": SamplingField(
        0.0, "Draw from the tokens of at least this share of the likeliest token's probability.", {"ge": 0, "le": 1}
    ),
    "presence_penalty": SamplingField(
        0.0, "Amount subtracted from the logit of each token of the answer.", {"ge": -2, "le": 2}
    ),
    "frequency_penalty": SamplingField(
        0.0, "Amount subtracted from a token's logit for each time that the answer has it.", {"ge": -2, "le": 2}
    ),
    "repetition_penalty": SamplingField(
        1.0,
        "Amount that divides positive logits and multiplies negative ones of tokens of the prompt and the answer.",
        {"ge": 0.01, "le": 100},
    ),
    "min_tokens": SamplingField(0, "Smallest number of tokens of the answer, unless a stop text ends it.", {"ge": 0}),
    "ignore_eos": SamplingField(False, "Do not end the answer at a token that ends a document."),
    "seed": SamplingField(
        None, "Seed of the random draws; equal seeds give equal answers, and each prompt or choice derives its own."
    ),
    "stop": SamplingField([], "Text that ends an answer and is not part of it."),
    "logit_bias": SamplingField({}, "Amounts added to the logits of tokens, by token id."),
    "logprobs": SamplingField(None, "Report log-probabilities of tokens, and this number of likeliest alternatives."),
}
