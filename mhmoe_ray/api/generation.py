"""Checks of the arguments that users give for text generation; a wrong argument is a ServeError."""

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, TypedDict, Unpack

from pydantic import ValidationError

from mhmoe_ray.errors import ServeError
from mhmoe_ray.serving.api.schema import parse_messages
from mhmoe_ray.serving.sampling import SamplingParams

Messages = Sequence[Mapping[str, str]]
"""Conversation: messages with a `role` and a `content`, up to where the assistant's next answer begins."""
TokenIds = Sequence[int]
Prompt = str | Messages | TokenIds
ONE_PROMPT = "give a text, a list of messages or a list of token ids"


def split_prompts(prompts: Prompt | Sequence[Prompt]) -> tuple[list[Any], bool]:
    """Return the prompts in a user's argument as a list, and whether the argument was a single prompt."""
    if isinstance(prompts, str):
        return [prompts], True
    values = _plain_list(prompts, f"{ONE_PROMPT}, or a list of them")
    is_single = bool(values) and isinstance(values[0], Mapping | Integral)
    return ([values] if is_single else values), is_single


def prompt_elements(prompt: Messages | TokenIds) -> list[Any]:
    """Return the unchecked elements (messages or token ids) of a single prompt, which must not be empty."""
    elements = _plain_list(prompt, ONE_PROMPT)
    if not elements:
        raise ServeError("the prompt", "it is an empty list", "give at least one message or token")
    return elements


def are_token_ids(elements: list[Any]) -> bool:
    """Return whether the elements of a prompt are token ids, and not messages."""
    return all(isinstance(element, Integral) for element in elements)


def checked_messages(elements: list[Any]) -> list[dict[str, Any]]:
    """Return messages in the form that chat templates take, after checking them as a server checks a request."""
    if not all(isinstance(element, Mapping) for element in elements):
        raise ServeError("the prompt", "it has elements that are neither messages nor token ids", ONE_PROMPT)
    try:
        return parse_messages([dict(message) for message in elements])
    except ValueError as e:
        raise ServeError("the prompt", str(e), 'write a message like {"role": "user", "content": "..."}') from e


def checked_text(text: str) -> str:
    """Return a text after checking that it has no lone surrogate, half of a character that no tokenizer can encode."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ServeError("the prompt", "it has half a character (a lone surrogate)", "give text in Unicode") from e
    return text


def _plain_list(value: Any, fix: str) -> list[Any]:
    """Return a sequence, numpy array or tensor as a list; `fix` is the advice in the error about any other value."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        raise ServeError("the prompt", "it is a single message", "give a list of messages: [message]")
    if not isinstance(value, Sequence):
        raise ServeError("the prompt", f"it is of type {type(value).__name__}", fix)
    return list(value)


class SamplingArguments(TypedDict, total=False):
    """Sampling parameters as keyword arguments; `SamplingParams` has their ranges, defaults and texts."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    min_tokens: int
    ignore_eos: bool
    logit_bias: dict[int, float]
    seed: int | None
    stop: str | Sequence[str]
    logprobs: int | None


_TYPE_WORDS = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "dict_type": "amounts by token id",
    "bool_type": "True or False",
}
_LIMIT_WORDS = {"gt": "more than", "ge": "at least", "lt": "less than", "le": "at most"}


def checked_sampling(**arguments: Unpack[SamplingArguments]) -> SamplingParams:
    """Return sampling parameters after checking their types and ranges."""
    try:
        return SamplingParams(**arguments)  # type: ignore[arg-type]  # a validator takes a single stop text
    except ValidationError as e:
        error = e.errors()[0]
    name, kind, value = str(error["loc"][0]), error["type"], error["input"]
    if kind == "extra_forbidden":
        raise TypeError(f"got an unexpected keyword argument {name!r}")
    if kind == "string_too_short":
        raise ServeError(name, "an empty text would end every answer at once", "leave it out")
    if name == "stop":
        raise ServeError(name, f"{value!r} is not a text", "give a text, or a list of texts")
    limits = [f"{_LIMIT_WORDS[key]} {limit:.10g}" for key, limit in error.get("ctx", {}).items()]
    raise ServeError(name, f"it is {value!r}", f"give {_TYPE_WORDS.get(kind) or limits[0]}")
