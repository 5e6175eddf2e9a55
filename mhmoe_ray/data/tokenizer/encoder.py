"""Encoding of documents to token ids, in which text never becomes a special token.

tiktoken encodes byte-level BPE several times as fast as the tokenizers library, and is used if both surely encode every
text alike. The library merges the two neighbours with the lowest rank of the pair, tiktoken those with the lowest rank
of the token that they form. Both give the same ids if the merges are in the order of the tokens that they form, and
each token meets one of two conditions:

- It has a merge for every way to cut it into two tokens, as in a vocabulary in tiktoken's format (see tiktoken.py).
- Encoding its bytes gives this token alone, and the merges of all tokens join only earlier tokens, as after training.
  Merges among bytes that spell the token do not depend on the text around them, as long as none joins them to bytes
  outside. At the token's rank, the bytes are therefore in the same two parts in any text, and this pair has a merge.

tiktoken looks up a whole piece of text before it merges anything. If the library does not do this (`ignore_merges` is
false), each token must be the result of encoding its own bytes.
"""

import json
import secrets
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from mhmoe_ray.data.tokenizer.load import read_tokenizer
from mhmoe_ray.data.tokenizer.tiktoken import BYTE_OF_LETTER, PATTERNS
from mhmoe_ray.data.tokenizer.vocabulary import BEGIN_TOKEN, END_OF_TEXT, END_TOKEN, boundaries
from mhmoe_ray.storage import Location

if TYPE_CHECKING:
    import tiktoken


NEWEST_LETTERS = "\U00011f04\U0001e4d0\U00031350\U0002ebf0\U000105c0\U00010d4a\u1c89\U00010940\U00011db0\U000323b0"
"""Letters that Unicode 15, 15.1, 16 and 17 added, which a regular-expression engine with older tables does not know."""

MAX_SPACE_RUN = 5_000
"""Characters of a window in which `can_encode` looks for white space: tiktoken's expressions backtrack over it, and
their engine's stack overflows on a run of a million characters."""


def fast_encoding(content: dict[str, Any]) -> "tiktoken.Encoding | None":
    """Return a tiktoken encoding with the ids of a parsed tokenizer.json, or None if this is not certain.

    It is for texts that `can_encode` accepts.
    """
    # Serving does not need tiktoken, so it is imported only here.
    import tiktoken

    if content["normalizer"] is not None or not all(token["special"] for token in content["added_tokens"]):
        return None
    pattern = _split_pattern(content["pre_tokenizer"])
    ranks = _token_ranks(content["model"]) if pattern and _newest_letters_agree(pattern) else None
    if pattern is None or ranks is None:
        return None
    return tiktoken.Encoding("fast", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def can_encode(text: str) -> bool:
    """Return whether tiktoken can encode a text, which then has no very long run of white space.

    Runs below `MAX_SPACE_RUN` characters are accepted, and runs of twice that length are refused.
    """
    # Windows at fixed distances are fast to check, and a run of twice their size always fills one.
    return not any(
        text[start : start + MAX_SPACE_RUN].isspace() for start in range(0, len(text) - MAX_SPACE_RUN, MAX_SPACE_RUN)
    )


def _split_pattern(split: dict[str, Any] | None) -> str | None:
    """Return the one pattern of `PATTERNS` by which a byte-level pre-tokenizer splits text, or None.

    tiktoken's regular-expression engine is another one than the library's, and interprets these patterns in the same
    way.
    """
    split_type = split and split["type"]
    if split is None or split_type not in ("ByteLevel", "Sequence"):
        return None
    parts: list[Any] = [None, split] if split_type == "ByteLevel" else split["pretokenizers"]
    if len(parts) != 2:
        return None
    splitter, byte_level = parts
    if (
        byte_level["type"] != "ByteLevel"
        or byte_level["add_prefix_space"]
        or byte_level["use_regex"] is not (splitter is None)
    ):
        return None
    # Without a separate splitter, ByteLevel splits by GPT-2's pattern.
    if splitter is None:
        return PATTERNS["gpt2"]
    isolated_split = {"type": "Split", "behavior": "Isolated", "invert": False}
    if {**splitter, "pattern": None} != {**isolated_split, "pattern": None}:
        return None
    pattern: str | None = splitter["pattern"].get("Regex")
    return pattern if pattern in PATTERNS.values() else None


def _newest_letters_agree(pattern: str) -> bool:
    """Return whether both engines, whose tables of letters differ, split text with Unicode's newest letters alike."""
    import tiktoken

    library = pre_tokenizers.Split(Regex(pattern), "isolated")
    texts = {c: f"a{c}" for c in NEWEST_LETTERS}
    tokens = [*(bytes([byte]) for byte in range(256)), *dict.fromkeys(t.encode()[:2] for t in texts.values())]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    fast_encoder = tiktoken.Encoding("newest", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    # Each text is the letter a and a new letter. If tiktoken does not split it, the a and the first byte of the new
    # letter become one token, with a rank above 255.
    return all(
        (len(library.pre_tokenize_str(t)) == 1) == (fast_encoder.encode_ordinary(t)[0] > 255) for t in texts.values()
    )


def _token_ranks(model: dict[str, Any]) -> dict[bytes, int] | None:
    """Return the ids of a model's tokens by their bytes, without tokens that no text is encoded to.

    The result is None if the model is not plain byte-level BPE, or tiktoken and the library may differ.
    """
    unusual_keys = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    if model["type"] != "BPE" or any(model[key] for key in unusual_keys):
        return None
    # Special tokens and others with letters that stand for no byte are left out, because no text is encoded to them.
    ranks = {_token_bytes(token): rank for token, rank in model["vocab"].items() if BYTE_OF_LETTER.keys() >= set(token)}
    has_only_bytes = all(
        BYTE_OF_LETTER.keys() >= set(left_part + right_part) for left_part, right_part in model["merges"]
    )
    if not has_only_bytes or not all(bytes([byte]) in ranks for byte in range(256)):
        return None
    cuts_of_token: dict[bytes, set[int]] = defaultdict(set)
    merge_ranks = []
    for left_part, right_part in (map(_token_bytes, pair) for pair in model["merges"]):
        cuts_of_token[left_part + right_part].add(len(left_part))
        merge_ranks.append(ranks[left_part + right_part])
    if any(next_rank < merge_rank for merge_rank, next_rank in pairwise(merge_ranks)):
        return None
    # If a token lacks a merge for a way to cut it in two, tiktoken and the library surely agree only if each token
    # consists of earlier tokens; the module's docstring tells why.
    long_tokens = [token for token in ranks if len(token) > 1]
    incomplete_tokens = [
        t for t in long_tokens if cuts_of_token[t] != {i for i in range(1, len(t)) if t[:i] in ranks and t[i:] in ranks}
    ]
    checked_tokens = incomplete_tokens if model["ignore_merges"] else long_tokens
    if incomplete_tokens and any(
        max(_part_ranks(t, cuts_of_token[t], ranks), default=-1) >= ranks[t] for t in long_tokens
    ):
        return None
    letters = {byte: letter for letter, byte in BYTE_OF_LETTER.items()}
    plain_model = models.BPE(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])
    is_stable = all(
        len(plain_model.tokenize("".join(map(letters.__getitem__, token)))) == 1 for token in checked_tokens
    )
    return ranks if is_stable else None


def _token_bytes(token: str) -> bytes:
    return bytes(BYTE_OF_LETTER[letter] for letter in token)


def _part_ranks(token: bytes, cuts: set[int], ranks: dict[bytes, int]) -> list[int]:
    parts = (part for cut in cuts for part in (token[:cut], token[cut:]) if len(part) > 1)
    return [ranks[part] for part in parts]


class DocumentEncoder:
    """Encoder of whole documents to token ids by a tokenizer with `boundaries`; text never becomes a special token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._start_token = boundaries(tokenizer).start
        content = _without_special_tokens(tokenizer)
        self._library_tokenizer = Tokenizer.from_str(json.dumps(content, ensure_ascii=False))
        self._fast_encoding = fast_encoding(content)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text as a document, beginning with the start token."""
        tiktoken_encoding = self._fast_encoding if all(map(can_encode, texts)) else None
        if tiktoken_encoding:
            return [[self._start_token, *tiktoken_encoding.encode_ordinary(text)] for text in texts]
        encodings = self._library_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [[self._start_token, *encoding.ids] for encoding in encodings]


@lru_cache(maxsize=1)
def document_encoder(path: Location) -> DocumentEncoder:
    """Return the encoder for a tokenizer.json that `load_tokenizer` accepts; a process caches its last encoder."""
    # The encoder is cached, because reading a large vocabulary takes seconds, and a chunk of documents may be small.
    return DocumentEncoder(read_tokenizer(path))


def _without_special_tokens(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the parsed tokenizer.json of a copy that finds no special token in any text.

    Special tokens keep their ids, but get random names. All other tokens stay the same.
    """
    # The library's `encode_special_tokens` does not suffice: it only stops the search for special tokens before the
    # model. A Unigram or word model usually has "<s>" among its pieces and still finds it.
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    special_tokens = {token["content"] for token in content["added_tokens"] if token["special"]} | {
        END_OF_TEXT,
        BEGIN_TOKEN,
        END_TOKEN,
    }
    random_prefix = secrets.token_hex(16)

    def masked_name(name: str) -> str:
        return f"{random_prefix} {name}" if name in special_tokens else name

    for token in content["added_tokens"]:
        token["content"] = masked_name(token["content"])
    model = content["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {masked_name(token): token_id for token, token_id in model["vocab"].items()}
    else:
        model["vocab"] = [[masked_name(token), score] for token, score in model["vocab"]]
    if model.get("unk_token") is not None:
        model["unk_token"] = masked_name(model["unk_token"])
    if "merges" in model:
        model["merges"] = [[a, b] for a, b in model["merges"] if special_tokens.isdisjoint((a, b, a + b))]
    # The post-processor is removed, because it would add special tokens by their original names.
    content["post_processor"] = None
    content["truncation"] = content["padding"] = None
    return content
