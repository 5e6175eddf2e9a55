"""How many tokens there are, and how many bytes of text each stands for."""

import json
import re

import numpy as np
from tokenizers import Tokenizer

from mhmoe_ray.data.tokenizer.edges import find_boundaries, unknown_token

UNKNOWN = -1
_ONE_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def token_count(tokenizer: Tokenizer) -> int:
    """Ids are below it. There may be gaps among them, so that it can be more than the number of entries."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def token_widths(tokenizer: Tokenizer) -> np.ndarray:
    """Bytes of UTF-8 by token id, int64; 0 for special tokens, and UNKNOWN for the one that stands for any text that
    has no other. Those of a document's tokens add up to its own, but for a space that some tokenizers put before its
    first word, and for what a normalizer has changed before."""
    content = json.loads(tokenizer.to_str())
    added = {token["id"]: token["special"] for token in content["added_tokens"]}
    byte_level = '"ByteLevel"' in json.dumps(content["decoder"])
    widths = np.zeros(token_count(tokenizer), np.int64)
    for token, number in tokenizer.get_vocab().items():
        if not added.get(number):
            widths[number] = _width(token, byte_level and number not in added)  # an added one is written as it is
    unknown, edges = unknown_token(tokenizer), find_boundaries(tokenizer)
    # Tokenizers of GPT-2's kind name the end of a text there, and spell all in bytes.
    if unknown is not None and not (edges and unknown in edges.ends):
        widths[unknown] = UNKNOWN
    return widths


def _width(token: str, byte_level: bool) -> int:
    if byte_level:
        return len(token)  # each character is a byte, under another name
    return 1 if _ONE_BYTE.fullmatch(token) else len(token.replace("▁", " ").encode())
