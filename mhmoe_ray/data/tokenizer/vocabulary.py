"""Facts about a vocabulary: the boundary tokens of documents, the number of tokens, and the bytes of text of each."""

import json
import re
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
BEGIN, END = "<s>", "</s>"


class Boundaries(NamedTuple):
    """Token ids that mark the boundaries of a document."""

    start: int
    """Token that precedes each document."""
    ends: frozenset[int]
    """Tokens each of which means that a document is over."""


def unknown_token(tokenizer: Tokenizer) -> int | None:
    """Return the id of the tokenizer's unknown token, or None if it has none."""
    model = json.loads(tokenizer.to_str())["model"]
    unknown = model.get("unk_token", model.get("unk_id"))
    return tokenizer.token_to_id(unknown) if isinstance(unknown, str) else unknown


def boundaries(tokenizer: Tokenizer) -> Boundaries:
    """Return the boundary tokens of a tokenizer, by the table in the package's docstring.

    Raises:
        ValueError: the tokenizer has neither kind of boundary tokens; `load_tokenizer` refuses such a tokenizer.
    """
    found = find_boundaries(tokenizer)
    if found is None:
        raise ValueError(f"no {END_OF_TEXT}, {BEGIN} and {END} in the tokenizer")
    return found


def find_boundaries(tokenizer: Tokenizer) -> Boundaries | None:
    """Return the boundary tokens of a tokenizer as `boundaries` does, or None if it has neither kind."""
    both, begin, end = (tokenizer.token_to_id(token) for token in (END_OF_TEXT, BEGIN, END))
    if both is not None:
        return Boundaries(both, frozenset([both]))
    if begin is not None and end is not None:
        return Boundaries(begin, frozenset([begin, end]))
    return None


UNKNOWN = -1
_PLAIN = "It is a plain text, of words and spaces: 12 of them, (or more)\nin 2 lines."
_ONE_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def token_count(tokenizer: Tokenizer) -> int:
    """Return the bound that all token ids are below.

    There may be gaps among the ids, so that it can be more than the number of entries.
    """
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def token_widths(tokenizer: Tokenizer) -> np.ndarray:
    """Return the number of UTF-8 bytes of text that each token id stands for, int64.

    It is 0 for special tokens, and UNKNOWN for the unknown token, which stands for any text that has no other token.
    The widths of a document's tokens add up to its bytes, except for a space that some tokenizers add before the first
    word, and for what a normalizer changed first. If a tokenizer leaves out parts of a text, such as spaces, all widths
    are UNKNOWN.
    """
    content = json.loads(tokenizer.to_str())
    added = {token["id"]: token["special"] for token in content["added_tokens"]}
    byte_level = '"ByteLevel"' in json.dumps([content["pre_tokenizer"], content["decoder"]])
    marks = content["model"].get("continuing_subword_prefix") or "", content["model"].get("end_of_word_suffix") or ""
    widths = np.zeros(token_count(tokenizer), np.int64)
    for token, number in tokenizer.get_vocab().items():
        if number not in added:
            widths[number] = _width(token.removeprefix(marks[0]).removesuffix(marks[1]), byte_level)
        elif not added[number]:
            widths[number] = _width(token, False)  # it is written as it is
    unknown, edges = unknown_token(tokenizer), find_boundaries(tokenizer)
    # Tokenizers of GPT-2's kind name the end of a text there, and spell all in bytes.
    if unknown is not None and not (edges and unknown in edges.ends):
        widths[unknown] = UNKNOWN
    plain = tokenizer.encode(_PLAIN, add_special_tokens=False).ids
    if unknown not in plain and widths[plain].sum() - len(_PLAIN) not in (0, 1):
        widths[:] = UNKNOWN
    return widths


def _width(token: str, byte_level: bool) -> int:
    if byte_level:
        return len(token)  # each character is a byte, under another name
    return 1 if _ONE_BYTE.fullmatch(token) else len(token.replace("▁", " ").encode())
