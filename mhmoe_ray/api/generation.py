"""Checks of the arguments that users give for text generation; a wrong argument is a ServeError."""

from collections.abc import Mapping, Sequence
from math import inf
from numbers import Integral, Real
from typing import Any

from mhmoe_ray.errors import ServeError
from mhmoe_ray.serving.api.schema import parse_messages

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


def checked_sampling(
    max_tokens: int, temperature: float, top_p: float, top_k: int, min_p: float, seed: int | None
) -> dict[str, Any]:
    """Return sampling parameters as fields of `SamplingParams` by name, after checking their types and ranges."""
    fields: dict[str, Any] = {
        "max_tokens": _checked_number("max_tokens", max_tokens, Integral),
        "temperature": _checked_number("temperature", temperature, Real),
        "top_p": _checked_number("top_p", top_p, Real),
        "top_k": _checked_number("top_k", top_k, Integral),
        "min_p": _checked_number("min_p", min_p, Real),
        "seed": None if seed is None else _checked_number("seed", seed, Integral),
    }
    for name, is_valid, expected_range in (
        ("max_tokens", max_tokens >= 1, "at least 1"),
        ("temperature", 0 <= temperature < inf, "0 or more"),
        ("top_p", 0 < top_p <= 1, "more than 0 and at most 1"),
        ("top_k", top_k >= 0, "0 or more"),
        ("min_p", 0 <= min_p <= 1, "0 to 1"),
    ):
        if not is_valid:
            raise ServeError(name, f"it is {fields[name]}", f"give {expected_range}")
    return fields


def _checked_number(name: str, value: object, number_type: type[Integral] | type[Real]) -> int | float:
    """Return a number from any library, such as numpy, as a Python int or float."""
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real) and number_type is Real:
        return float(value)
    raise ServeError(name, f"it is {value!r}", f"give a {'whole ' if number_type is Integral else ''}number")


def stop_texts(stop: str | Sequence[str]) -> list[str]:
    """Return the texts that end an answer as a list. An empty text, which would end every answer at once, is an
    error."""
    texts = [stop] if isinstance(stop, str) else list(stop) if isinstance(stop, Sequence) else [stop]
    for text in texts:
        if not isinstance(text, str):
            raise ServeError("stop", f"{text!r} is not a text", "give a text, or a list of texts")
        if not text:
            raise ServeError("stop", "an empty text would end every answer at once", "leave it out")
    return texts
