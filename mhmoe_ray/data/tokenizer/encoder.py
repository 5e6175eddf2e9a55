"""Encoding of documents to token ids, in which text never becomes a special token.

Byte-level BPE is encoded by tiktoken, which is several times as fast as the tokenizers library, but only where the two
encode every text alike. They differ in what decides the next merge of two neighbours: in the library it is the rank of
their pair, in tiktoken the rank of the token that they form. Both give the same ids if the merges are in the order of
the tokens that they form, and each token

- has a merge for every way to cut it in two, as in a vocabulary in tiktoken's format (see tiktoken.py); or
- is the result of encoding its own bytes, and all tokens are made of earlier ones only, as training makes them. Then,
  when the token's turn comes, a stretch of its bytes that no merge has crossed is always in the same two parts,
  whatever is around it, and these two parts are a pair in the list of merges.

tiktoken looks up a whole piece before it merges anything. Where the library does not (`ignore_merges` is false), each
token must be the result of encoding its own bytes.
"""

import json
import secrets
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from mhmoe_ray.data.tokenizer.tiktoken import BYTE_OF_LETTER, PATTERNS
from mhmoe_ray.data.tokenizer.vocabulary import BEGIN, END, END_OF_TEXT, boundaries

if TYPE_CHECKING:
    import tiktoken


NEWEST = "\U00011f04\U0001e4d0\U00031350\U0002ebf0\U000105c0\U00010d4a\u1c89\U00010940\U00011db0\U000323b0"
"""Letters that Unicode 15, 15.1, 16 and 17 added."""

LONGEST_SPACE = 5_000
"""Length of a run of white space, in characters, from which on tiktoken is not trusted with it: its expressions
backtrack over white space by recursion and fail where it is endless."""


def fast_encoding(content: dict[str, Any]) -> "tiktoken.Encoding | None":
    """Return a tiktoken encoding that encodes every text for which `can_encode` holds as the tokenizer does.

    Return None if that is not certain.

    Args:
        content: the parsed content of a tokenizer.json.
    """
    import tiktoken  # here, since serving does without it

    if content["normalizer"] is not None or not all(token["special"] for token in content["added_tokens"]):
        return None
    pattern = _pattern(content["pre_tokenizer"])
    ranks = _ranks(content["model"]) if pattern and _newest_letters_agree(pattern) else None
    if pattern is None or ranks is None:
        return None
    return tiktoken.Encoding("fast", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def can_encode(text: str) -> bool:
    """Return whether no run of white space fills a whole window of `LONGEST_SPACE` characters.

    A run of twice that length always fills one.
    """
    return not any(text[at : at + LONGEST_SPACE].isspace() for at in range(0, len(text) - LONGEST_SPACE, LONGEST_SPACE))


def _pattern(split: dict[str, Any] | None) -> str | None:
    """Return the pattern by which a pre-tokenizer splits text, if both libraries read it alike.

    Each library has a regular-expression engine of its own. Return None if the pattern is not in `PATTERNS`, or if the
    pre-tokenizer is not byte-level or does more than split by one pattern.
    """
    kind = split and split["type"]
    if split is None or kind not in ("ByteLevel", "Sequence"):
        return None
    parts: list[Any] = [None, split] if kind == "ByteLevel" else split["pretokenizers"]
    if len(parts) != 2:
        return None
    first, last = parts
    if last["type"] != "ByteLevel" or last["add_prefix_space"] or last["use_regex"] is not (first is None):
        return None
    if first is None:
        return PATTERNS["gpt2"]
    isolated = {"type": "Split", "behavior": "Isolated", "invert": False}
    if {**first, "pattern": None} != {**isolated, "pattern": None}:
        return None
    pattern: str | None = first["pattern"].get("Regex")
    return pattern if pattern in PATTERNS.values() else None


def _newest_letters_agree(pattern: str) -> bool:
    """Return whether the two engines, each with tables of its own, agree on the characters added to Unicode last."""
    import tiktoken

    library = pre_tokenizers.Split(Regex(pattern), "isolated")
    text = {c: f"a{c}" for c in NEWEST}
    tokens = [*(bytes([byte]) for byte in range(256)), *dict.fromkeys(t.encode()[:2] for t in text.values())]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    fast = tiktoken.Encoding("newest", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    # In one piece, the a and the first byte of the character become one token.
    return all((len(library.pre_tokenize_str(t)) == 1) == (fast.encode_ordinary(t)[0] > 255) for t in text.values())


def _ranks(model: dict[str, Any]) -> dict[bytes, int] | None:
    """Return the tokens that text can become, with their ids.

    Return None if the model is not plain byte-level BPE, or if it is not certain that both libraries encode alike.
    """
    unusual = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    if model["type"] != "BPE" or any(model[key] for key in unusual):
        return None
    # A token with other letters comes of no text.
    ranks = {_bytes(token): rank for token, rank in model["vocab"].items() if BYTE_OF_LETTER.keys() >= set(token)}
    bytes_only = all(BYTE_OF_LETTER.keys() >= set(left + right) for left, right in model["merges"])
    if not bytes_only or not all(bytes([byte]) in ranks for byte in range(256)):
        return None
    cuts: dict[bytes, set[int]] = defaultdict(set)
    order = []
    for left, right in (map(_bytes, pair) for pair in model["merges"]):
        cuts[left + right].add(len(left))
        order.append(ranks[left + right])
    if any(after < before for before, after in pairwise(order)):
        return None
    long = [token for token in ranks if len(token) > 1]
    some = [t for t in long if cuts[t] != {i for i in range(1, len(t)) if t[:i] in ranks and t[i:] in ranks}]
    by_itself = some if model["ignore_merges"] else long
    if some and any(max(_rank_of_parts(t, cuts[t], ranks), default=-1) >= ranks[t] for t in long):
        return None
    letters = {byte: letter for letter, byte in BYTE_OF_LETTER.items()}
    plain = models.BPE(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])
    comes_out = all(len(plain.tokenize("".join(map(letters.__getitem__, token)))) == 1 for token in by_itself)
    return ranks if comes_out else None


def _bytes(token: str) -> bytes:
    return bytes(BYTE_OF_LETTER[letter] for letter in token)


def _rank_of_parts(token: bytes, cuts: set[int], ranks: dict[bytes, int]) -> list[int]:
    """Return the ranks of those parts of a token, cut in two at `cuts`, that are themselves merged, not single
    bytes."""
    parts = (part for at in cuts for part in (token[:at], token[at:]) if len(part) > 1)
    return [ranks[part] for part in parts]


class DocumentEncoder:
    """Encoder of whole documents.

    Args:
        tokenizer: a tokenizer with boundary tokens, which mark the edges of documents.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._start = boundaries(tokenizer).start
        content = _of_text_alone(tokenizer)
        self._library = Tokenizer.from_str(json.dumps(content, ensure_ascii=False))
        self._fast = fast_encoding(content)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each document, with its start token first."""
        fast = self._fast if all(map(can_encode, texts)) else None
        if fast:
            return [[self._start, *fast.encode_ordinary(text)] for text in texts]
        encodings = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [[self._start, *encoding.ids] for encoding in encodings]


@lru_cache(maxsize=1)
def document_encoder(path: Path) -> DocumentEncoder:
    """Return the encoder of a tokenizer.json that `load_tokenizer` accepts.

    It is cached within a process, since reading a large vocabulary takes seconds and raw files may be small.
    """
    return DocumentEncoder(Tokenizer.from_file(str(path)))


def _of_text_alone(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the content of a tokenizer.json that yields no special token for any text, and otherwise the same tokens.

    The library's own `encode_special_tokens` only keeps it from looking for special tokens before the model sees the
    text: a Unigram or word model that has "<s>" among its pieces, as they do, still finds it. Here special tokens
    therefore get random names that no text can contain, and keep their ids.
    """
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    special = {token["content"] for token in content["added_tokens"] if token["special"]} | {END_OF_TEXT, BEGIN, END}
    unknowable = secrets.token_hex(16)

    def renamed(token: str) -> str:
        return f"{unknowable} {token}" if token in special else token

    for token in content["added_tokens"]:
        token["content"] = renamed(token["content"])
    model = content["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {renamed(token): number for token, number in model["vocab"].items()}
    else:
        model["vocab"] = [[renamed(token), score] for token, score in model["vocab"]]
    if model.get("unk_token") is not None:
        model["unk_token"] = renamed(model["unk_token"])
    if "merges" in model:
        model["merges"] = [[a, b] for a, b in model["merges"] if special.isdisjoint((a, b, a + b))]
    # It would put in special tokens, by their old names.
    content["post_processor"] = None
    content["truncation"] = content["padding"] = None
    return content
