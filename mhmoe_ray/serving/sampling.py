"""The sampling parameters of an answer: the one place of their names, types, ranges, defaults and texts.

`mhmoe generate`, `LoadedModel.generate` and batch inference take `SamplingParams`. Requests over HTTP have the fields
of `CommonSampling`, and the others in the form of OpenAI's API (`serving/api/schema.py`).
"""

from numbers import Integral, Real
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

MAX_TEMPERATURE = 2.0
"""Largest temperature in OpenAI's API and of `mhmoe generate`."""


def check_encodable(text: str) -> str:
    # JSON can carry half of a surrogate pair, which is not a character. `encode` raises a ValueError for it.
    text.encode()
    return text


def wrap_text(value: Any) -> Any:
    """Return a single text as a list of one, and a tuple as a list; any other value is returned unchanged."""
    return [value] if isinstance(value, str) else list(value) if isinstance(value, tuple) else value


def _plain_number(value: Any) -> Any:
    """Return a number of any library, such as numpy, as an int if it is whole, and else as a float."""
    if isinstance(value, bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    # Strict validation refuses 1.0 for an integer, but in JSON 1.0 and 1 are the same number.
    if isinstance(value, Real):
        return int(float(value)) if float(value).is_integer() else float(value)
    return value


MAX_LOGPROBS = 20
"""Largest number of alternatives to report beside each token, as in OpenAI's API."""
PLAIN_NUMBER = BeforeValidator(_plain_number)
WholeNumber = Annotated[int, PLAIN_NUMBER]
Number = Annotated[float, PLAIN_NUMBER]
# Limits inside `| None` come before the validator, so that a JSON schema has them.
PositiveNumber = Annotated[int, Field(ge=1), PLAIN_NUMBER]
LogprobCount = Annotated[int, Field(ge=0, le=MAX_LOGPROBS), PLAIN_NUMBER]
Bias = Annotated[float, Field(ge=-100, le=100), PLAIN_NUMBER]
Text = Annotated[str, AfterValidator(check_encodable)]
# An empty stop text would end every answer before its first token.
StopText = Annotated[str, Field(min_length=1), AfterValidator(check_encodable)]


class CommonSampling(BaseModel):
    """Sampling parameters in the order penalties and biases, temperature, top_k, min_p, top_p, as they take effect."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True)

    temperature: Number = Field(1.0, ge=0, allow_inf_nan=False)
    """Sampling temperature; 0 takes the most likely token each time."""
    top_p: Number = Field(1.0, gt=0, le=1)
    """Draw from the likeliest tokens of this total probability."""
    top_k: WholeNumber = Field(0, ge=0, lt=2**31)
    """Draw from this number of likeliest tokens; 0 draws from all."""
    min_p: Number = Field(0.0, ge=0, le=1)
    """Draw from the tokens of at least this share of the likeliest token's probability."""
    presence_penalty: Number = Field(0.0, ge=-2, le=2)
    """Amount subtracted from the logit of each token of the answer."""
    frequency_penalty: Number = Field(0.0, ge=-2, le=2)
    """Amount subtracted from a token's logit for each time that the answer has it."""
    seed: WholeNumber | None = None
    """Seed of the random draws; equal seeds give equal answers, and each prompt or choice derives its own."""
    stop: Annotated[list[StopText], BeforeValidator(wrap_text, StopText | list[StopText])] = []
    """Text that ends an answer and is not part of it."""


class SamplingParams(CommonSampling):
    """All sampling parameters of an answer, with those that OpenAI's API has in another form."""

    max_tokens: WholeNumber = Field(128, ge=1)
    """Largest number of tokens of the answer."""
    logit_bias: dict[Annotated[int, Field(ge=0)], Bias] = {}
    """Amounts added to the logits of tokens, by token id."""
    logprobs: LogprobCount | None = None
    """Report log-probabilities of tokens, and this number of likeliest alternatives."""

    def for_answer(self, index: int) -> Self:
        """Return the parameters of answer `index` of a request, which has its own seed; answer 0 uses the request's."""
        # Users often give small seeds, one after another. A large odd stride (2**64 over the golden ratio) keeps the
        # seeds of the further answers away from other small seeds.
        seed = None if self.seed is None else self.seed + index * 0x9E3779B97F4A7C15
        return self.model_copy(update={"seed": seed})
