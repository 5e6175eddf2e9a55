"""The tokens between documents."""

import json
from typing import NamedTuple

from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
BEGIN, END = "<s>", "</s>"


class Boundaries(NamedTuple):
    """Token ids at the edges of a document."""

    start: int
    """Precedes each one."""
    ends: frozenset[int]
    """Any of these says that it is over."""


def unknown_token(tokenizer: Tokenizer) -> int | None:
    """The id of its token for what it does not know, if it has one."""
    model = json.loads(tokenizer.to_str())["model"]
    unknown = model.get("unk_token", model.get("unk_id"))
    return tokenizer.token_to_id(unknown) if isinstance(unknown, str) else unknown


def boundaries(tokenizer: Tokenizer) -> Boundaries:
    """By the package's table.

    Raises:
        ValueError: it is of neither kind, which `load_tokenizer` refuses.
    """
    found = find_boundaries(tokenizer)
    if found is None:
        raise ValueError(f"no {END_OF_TEXT}, {BEGIN} and {END} in the tokenizer")
    return found


def find_boundaries(tokenizer: Tokenizer) -> Boundaries | None:
    """As `boundaries`; None for a tokenizer of neither kind."""
    both, begin, end = (tokenizer.token_to_id(token) for token in (END_OF_TEXT, BEGIN, END))
    if both is not None:
        return Boundaries(both, frozenset([both]))
    if begin is not None and end is not None:
        return Boundaries(begin, frozenset([begin, end]))
    return None
