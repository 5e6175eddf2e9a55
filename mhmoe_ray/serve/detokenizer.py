"""Tokens to text, in pieces that are never taken back."""

from collections.abc import Sequence
from itertools import groupby

from tokenizers import Tokenizer

from mhmoe_ray.data.tokenizer.tiktoken import BYTE_OF_LETTER

REPLACEMENT = "\ufffd"
CONTEXT = 8  # tokens of the prompt that are decoded along


class TextDecoder:
    """Tokens to text, where more tokens only ever add to the text, but for a last character that is not whole yet.

    A tokenizer with byte fallback (LLaMA's, Mixtral's) has tokens <0x00> to <0xFF> for what its vocabulary lacks. The
    library turns a whole row of them into replacement characters as long as one character in it is not whole, those
    that were whole before included; so here the row is decoded as bytes first, as a byte-level tokenizer does it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        found = (tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        self._byte = {token: byte for byte, token in enumerate(found) if token is not None}
        """The byte of each such token."""
        if len(self._byte) < 256 or tokenizer.decode([next(t for t, b in self._byte.items() if b == 65)]) != "A":
            self._byte = {}
        self.special = {token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special}
        """Tokens without a text."""

    def __call__(self, ids: Sequence[int]) -> str:
        if self._byte.keys().isdisjoint(ids):
            return self._tokenizer.decode(ids)
        parts: list[str] = []
        for are_bytes, row in groupby((t for t in ids if t not in self.special), self._byte.__contains__):
            if are_bytes:
                parts.append(bytes(self._byte[t] for t in row).decode("utf-8", "replace"))
            else:
                parts.extend(token for t in row if (token := self._tokenizer.id_to_token(t)) is not None)
        return str(self._tokenizer.decoder.decode(parts))


class TextStream:
    """Decodes the tokens of one answer as they come.

    A byte-level token may end in the middle of a character, and a stop string may begin in one token and end in a
    later one. So text that a later token could still change or cut away is held back. The pieces joined are the whole
    answer, which ends before the first stop string.
    """

    def __init__(self, decode: TextDecoder, stops: Sequence[str] = (), prompt_ids: Sequence[int] = ()) -> None:
        """Args:
        decode: of the tokenizer.
        stops: the answer ends before the first of these.
        prompt_ids: what the answer goes on from. A decoder may drop the space at the start of a text, which the middle
            of one must keep.
        """
        self._decode, self._stops = decode, stops
        self._ids: list[int] = list(prompt_ids[-CONTEXT:])
        """The newest tokens, not all: the time that a token takes must not grow with the answer."""
        self._seen = len(decode(self._ids))
        """Characters of their text that have been taken."""
        self._held = ""
        """Text that was taken and not given away."""
        self.stopped = False
        """A stop string has come: no more tokens are wanted."""

    @property
    def at_start(self) -> bool:
        """Whether nothing that has a text comes before the next token."""
        return self._decode.special.issuperset(self._ids)

    def push(self, token: int) -> str:
        """The text that is certain after one more token; often empty."""
        self._ids.append(token)
        text = self._decode(self._ids)
        # The bytes of a character that is not whole yet decode to one replacement character at the very end.
        piece = self._release(self._taken(text.removesuffix(REPLACEMENT)), final=False)
        if len(self._ids) >= 4 * CONTEXT and not text.endswith(REPLACEMENT):
            # Not all of them: a decoder may treat the start of a text in its own way.
            self._ids = self._ids[-CONTEXT:]
            self._seen = len(self._decode(self._ids))
        return piece

    def finish(self) -> str:
        """What is left when no more tokens come."""
        return "" if self.stopped else self._release(self._taken(self._decode(self._ids)), final=True)

    def _taken(self, text: str) -> str:
        """All that is not given away, with what is new in the text of the newest tokens."""
        new, self._seen = text[self._seen :], max(self._seen, len(text))
        return self._held + new

    def _release(self, text: str, final: bool) -> str:
        starts = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if starts:
            self.stopped = True
            end = min(starts)
        else:
            end = len(text) if final else len(text) - _open_stop(text, self._stops)
        self._held = text[end:]
        return text[:end]


def _open_stop(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of the text with which a stop string may have begun."""
    longest = max(map(len, stops), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0


def shown(part: bytes) -> str:
    """A token as clients read it: "bytes:" and its bytes in hexadecimal where it is no whole characters."""
    try:
        return part.decode()
    except UnicodeDecodeError:
        return f"bytes:{part.hex()}"


class TokenBytes:
    """What each token stands for by itself, in the middle of a text in UTF-8."""

    def __init__(self, tokenizer: Tokenizer, decode: TextDecoder) -> None:
        self._tokenizer, self._decode = tokenizer, decode
        # After it, a decoder drops no space.
        self._before = tokenizer.encode("a", add_special_tokens=False).ids
        self._special = {
            token: added.content for token, added in tokenizer.get_added_tokens_decoder().items() if added.special
        }
        self._known: dict[int, bytes] = {}

    def __getitem__(self, token: int) -> bytes:
        if token not in self._known:
            self._known[token] = self._found(token)
        return self._known[token]

    def _found(self, token: int) -> bytes:
        if token in self._special:
            return self._special[token].encode()
        text = self._decode([*self._before, token])[len(self._decode(self._before)) :]
        if REPLACEMENT in text:
            name = self._tokenizer.id_to_token(token) or ""
            if name.startswith("<0x"):
                return bytes.fromhex(name[3:5])
            if BYTE_OF_LETTER.keys() >= set(name):
                return bytes(BYTE_OF_LETTER[letter] for letter in name)
        return text.encode()  # maybe U+FFFD itself, which a vocabulary may have
