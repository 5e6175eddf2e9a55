"""The sampling parameters of an answer: their types, with the defaults, limits and texts of `sampling_fields.py`.

`mhmoe generate`, `LoadedModel.generate` and batch inference take `SamplingParams`. Requests over HTTP have the fields
of `CommonSampling`, and the others in the form of OpenAI's API (`serving/api/schema.py`).
"""

from numbers import Integral, Real
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticKnownError

from mhmoe_ray.serving.sampling_fields import MAX_LOGPROBS, SAMPLING_FIELDS


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


def sampling_field(name: str, **settings: Any) -> Any:
    """Return pydantic's field of a sampling parameter."""
    field = SAMPLING_FIELDS[name]
    limits: dict[str, Any] = {**field.limits, **settings}
    return Field(field.default, description=field.text, **limits)


class CommonSampling(BaseModel):
    """Sampling parameters, which take effect in the order biases, penalties, temperature, top_k, min_p, top_p."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    temperature: Number = sampling_field("temperature", allow_inf_nan=False)
    top_p: Number = sampling_field("top_p")
    top_k: WholeNumber = sampling_field("top_k")
    min_p: Number = sampling_field("min_p")
    presence_penalty: Number = sampling_field("presence_penalty")
    frequency_penalty: Number = sampling_field("frequency_penalty")
    repetition_penalty: Number = sampling_field("repetition_penalty")
    min_tokens: WholeNumber = sampling_field("min_tokens")
    ignore_eos: bool = sampling_field("ignore_eos")
    seed: WholeNumber | None = sampling_field("seed")
    stop: Annotated[list[StopText], BeforeValidator(wrap_text, StopText | list[StopText])] = sampling_field("stop")


class SamplingParams(CommonSampling):
    """All sampling parameters of an answer, with those that OpenAI's API has in another form."""

    max_tokens: WholeNumber = sampling_field("max_tokens", validate_default=True)
    logit_bias: dict[Annotated[int, Field(ge=0)], Bias] = sampling_field("logit_bias")
    logprobs: LogprobCount | None = sampling_field("logprobs")

    @field_validator("max_tokens")
    @classmethod
    def _check_max_tokens(cls, value: int, info: ValidationInfo) -> int:
        if value < (min_tokens := info.data.get("min_tokens", 0)):
            raise PydanticKnownError("greater_than_equal", {"ge": min_tokens})
        return value

    def for_answer(self, index: int) -> Self:
        """Return the parameters of answer `index` of a request, which has its own seed; answer 0 uses the request's."""
        # Users often give small seeds, one after another. A large odd stride (2**64 over the golden ratio) keeps the
        # seeds of the further answers away from other small seeds.
        seed = None if self.seed is None else self.seed + index * 0x9E3779B97F4A7C15
        return self.model_copy(update={"seed": seed})
