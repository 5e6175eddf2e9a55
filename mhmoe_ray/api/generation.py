"""Arguments of text generation as users give them: prompts, sampling parameters and stop texts, and their checks."""

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
    """Return a list of prompts, and whether it was a single prompt, which is a list of one then.

    Raises:
        ServeError: it is neither a prompt nor a list of prompts.
    """
    if isinstance(prompts, str):
        return [prompts], True
    values = _plain_list(prompts, f"{ONE_PROMPT}, or a list of them")
    is_single = bool(values) and isinstance(values[0], Mapping | Integral)
    return ([values] if is_single else values), is_single


def prompt_elements(prompt: Messages | TokenIds) -> list[Any]:
    """Return the messages or the token ids of a single prompt, which are not checked.

    Raises:
        ServeError: it is neither, or empty.
    """
    elements = _plain_list(prompt, ONE_PROMPT)
    if not elements:
        raise ServeError("the prompt", "it is an empty list", "give at least one message or token")
    return elements


def are_token_ids(elements: list[Any]) -> bool:
    """Return whether the elements of a prompt are token ids, and not messages."""
    return all(isinstance(element, Integral) for element in elements)


def checked_messages(elements: list[Any]) -> list[dict[str, Any]]:
    """Return messages as chat templates take them, after the checks of a request to a server.

    Raises:
        ServeError: an element is no message, or lacks a role or a content.
    """
    if not all(isinstance(element, Mapping) for element in elements):
        raise ServeError("the prompt", "it has elements that are neither messages nor token ids", ONE_PROMPT)
    try:
        return parse_messages([dict(message) for message in elements])
    except ValueError as e:
        raise ServeError("the prompt", str(e), 'write a message like {"role": "user", "content": "..."}') from e


def checked_text(text: str) -> str:
    """Return a text after checking that it consists of characters.

    Raises:
        ServeError: it has a lone surrogate, half of a character, which no tokenizer can encode.
    """
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ServeError("the prompt", "it has half a character (a lone surrogate)", "give text in Unicode") from e
    return text


def _plain_list(value: Any, fix: str) -> list[Any]:
    """Return a sequence as a list, and an array of numpy or a tensor of torch as a list of numbers.

    Raises:
        ServeError: it is no sequence, or a single message; `fix` says what to give.
    """
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
    """Return these fields of `SamplingParams` by name, after checking their types and ranges.

    Raises:
        ServeError: one is not a number, or out of its range.
    """
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
    """Return a number of Python for a number of any library.

    Raises:
        ServeError: the value is not such a number.
    """
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real) and number_type is Real:
        return float(value)
    raise ServeError(name, f"it is {value!r}", f"give a {'whole ' if number_type is Integral else ''}number")


def stop_texts(stop: str | Sequence[str]) -> list[str]:
    """Return the texts that end an answer as a list; a single text is one of them.

    Raises:
        ServeError: one is empty, so it would end every answer at once, or is no text.
    """
    texts = [stop] if isinstance(stop, str) else list(stop) if isinstance(stop, Sequence) else [stop]
    for text in texts:
        if not isinstance(text, str):
            raise ServeError("stop", f"{text!r} is not a text", "give a text, or a list of texts")
        if not text:
            raise ServeError("stop", "an empty text would end every answer at once", "leave it out")
    return texts
