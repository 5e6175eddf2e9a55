"""Properties of a vocabulary: boundary tokens of documents, number of tokens, and bytes of each token."""

import json
import re
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
BEGIN_TOKEN, END_TOKEN = "<s>", "</s>"
UNKNOWN_WIDTH = -1
"""Width of a token that stands for an unknown number of bytes."""
# `token_widths` encodes this text to find tokenizers that leave out spaces, punctuation or line breaks: their tokens of
# the text have fewer bytes than the text.
_PLAIN_TEXT = "It is a plain text, of words and spaces: 12 of them, (or more)\nin 2 lines."


class Boundaries(NamedTuple):
    """Ids of the token that precedes each document, and of the tokens that each end one."""

    start: int
    ends: frozenset[int]


def unknown_token(tokenizer: Tokenizer) -> int | None:
    """Return the id of the tokenizer's unknown token, or None."""
    model = json.loads(tokenizer.to_str())["model"]
    unknown_entry = model.get("unk_token", model.get("unk_id"))
    return tokenizer.token_to_id(unknown_entry) if isinstance(unknown_entry, str) else unknown_entry


def added_start_token(tokenizer: Tokenizer) -> int | None:
    """Return the special token that the tokenizer's post-processor puts before a text, or None."""
    text_ids = tokenizer.encode(_PLAIN_TEXT, add_special_tokens=False).ids
    ids = tokenizer.encode(_PLAIN_TEXT).ids
    return ids[0] if text_ids and ids[1 : 1 + len(text_ids)] == text_ids else None


def boundaries(tokenizer: Tokenizer) -> Boundaries:
    """Return the boundary tokens by the table in `mhmoe_ray.data.tokenizer`; raise ValueError if there are none."""
    boundary_tokens = find_boundaries(tokenizer)
    if boundary_tokens is None:
        raise ValueError(
            f"no {END_OF_TEXT}, {BEGIN_TOKEN} and {END_TOKEN} in the tokenizer, and it adds no start token"
        )
    return boundary_tokens


def find_boundaries(tokenizer: Tokenizer) -> Boundaries | None:
    """Return the boundary tokens, or None if the tokenizer has none."""
    end_of_text, begin, end = (tokenizer.token_to_id(token) for token in (END_OF_TEXT, BEGIN_TOKEN, END_TOKEN))
    start = added_start_token(tokenizer)
    if start is not None:
        return Boundaries(start, frozenset(token for token in (start, end_of_text, end) if token is not None))
    if end_of_text is not None:
        return Boundaries(end_of_text, frozenset([end_of_text]))
    if begin is not None and end is not None:
        return Boundaries(begin, frozenset([begin, end]))
    return None


def boundary_texts(tokenizer: Tokenizer) -> tuple[str, str]:
    """Return the texts of a document's start token and of an end token, if possible another one: </s>, not <s>."""
    start, ends = boundaries(tokenizer)
    start_text, end_text = (tokenizer.id_to_token(token) for token in (start, max(ends - {start}, default=start)))
    assert start_text is not None
    assert end_text is not None
    return start_text, end_text


def chat_texts(tokenizer: Tokenizer) -> tuple[str, str, tuple[str, ...]]:
    """Return the `boundary_texts`, and the texts of all special tokens."""
    added_tokens = tokenizer.get_added_tokens_decoder().values()
    return *boundary_texts(tokenizer), tuple(token.content for token in added_tokens if token.special)


_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


def token_count(tokenizer: Tokenizer) -> int:
    """Return one more than the largest token id; ids may have gaps, so it can exceed the number of entries."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def token_widths(tokenizer: Tokenizer) -> np.ndarray:
    """Return the number of UTF-8 bytes of text that each token id stands for, int64.

    The width is 0 for special tokens, and UNKNOWN_WIDTH for the unknown token. Widths add up to a document's bytes,
    except for a space that some tokenizers add before the first word, and for changes by a normalizer. If a tokenizer
    leaves out parts of a text, such as spaces, all widths are UNKNOWN_WIDTH.
    """
    content = json.loads(tokenizer.to_str())
    special_by_id = {token["id"]: token["special"] for token in content["added_tokens"]}
    is_byte_level = '"ByteLevel"' in json.dumps([content["pre_tokenizer"], content["decoder"]])
    affixes = content["model"].get("continuing_subword_prefix") or "", content["model"].get("end_of_word_suffix") or ""
    widths = np.zeros(token_count(tokenizer), np.int64)
    for token, token_id in tokenizer.get_vocab().items():
        if token_id not in special_by_id:
            widths[token_id] = _text_width(token.removeprefix(affixes[0]).removesuffix(affixes[1]), is_byte_level)
        elif not special_by_id[token_id]:
            # An added token is written as plain text even in a byte-level vocabulary.
            widths[token_id] = _text_width(token, False)
    unknown, boundary_tokens = unknown_token(tokenizer), find_boundaries(tokenizer)
    # Tokenizers like GPT-2's name the end-of-text token as the unknown one, but spell every text in bytes, so that the
    # token never stands for text.
    if unknown is not None and not (boundary_tokens and unknown in boundary_tokens.ends):
        widths[unknown] = UNKNOWN_WIDTH
    plain_ids = tokenizer.encode(_PLAIN_TEXT, add_special_tokens=False).ids
    if unknown not in plain_ids and widths[plain_ids].sum() - len(_PLAIN_TEXT) not in (0, 1):
        widths[:] = UNKNOWN_WIDTH
    return widths


def _text_width(token: str, is_byte_level: bool) -> int:
    if is_byte_level:
        # Each character of a byte-level token stands for one byte.
        return len(token)
    return 1 if _BYTE_TOKEN.fullmatch(token) else len(token.replace("▁", " ").encode())
