"""The tokens between documents."""

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


def boundaries(tokenizer: Tokenizer) -> Boundaries | None:
    """By the package's table; None for a tokenizer of neither kind."""
    both, begin, end = (tokenizer.token_to_id(token) for token in (END_OF_TEXT, BEGIN, END))
    if both is not None:
        return Boundaries(both, frozenset([both]))
    if begin is not None and end is not None:
        return Boundaries(begin, frozenset([begin, end]))
    return None
