"""Documents to token ids, in which text never becomes a special token."""

import json
import secrets
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from mhmoe_ray.data.tokenizer.edges import BEGIN, END, END_OF_TEXT, boundaries
from mhmoe_ray.data.tokenizer.fast import can_encode, fast_encoding


class DocumentEncoder:
    """Encodes whole documents.

    Args:
        tokenizer: with tokens for the edges of a document.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._start = boundaries(tokenizer).start
        content = _of_text_alone(tokenizer)
        self._library = Tokenizer.from_str(json.dumps(content, ensure_ascii=False))
        self._fast = fast_encoding(content)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each document, its start token first."""
        fast = self._fast if all(map(can_encode, texts)) else None
        if fast:
            return [[self._start, *fast.encode_ordinary(text)] for text in texts]
        encodings = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [[self._start, *encoding.ids] for encoding in encodings]


@lru_cache(maxsize=1)
def document_encoder(path: Path) -> DocumentEncoder:
    """The encoder of a tokenizer.json that `load_tokenizer` accepts. Kept within a process, since a large vocabulary
    takes seconds to read and raw files may be small."""
    return DocumentEncoder(Tokenizer.from_file(str(path)))


def _of_text_alone(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of a tokenizer.json that gives no special token for any text, and else the same tokens.

    The library's own `encode_special_tokens` only stops it from looking for them before the model sees the text: a
    Unigram or word model that has "<s>" among its pieces, as they do, still finds it. So here they have names that no
    text can know, under their old ids.
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
