"""Turn tokens into text that can be streamed: no piece is ever retracted."""

from collections.abc import Sequence
from itertools import groupby

from tokenizers import Tokenizer

from mhmoe_ray.data.tokenizer.tiktoken import BYTE_OF_LETTER

REPLACEMENT = "\ufffd"
CONTEXT = 8  # tokens of the prompt that are decoded along


class TextDecoder:
    """Decode tokens so that further tokens only append to the text, except for an incomplete last character.

    A tokenizer with byte fallback (LLaMA's, Mixtral's) has tokens <0x00> to <0xFF> for text that its vocabulary lacks.
    The library turns a whole row of such tokens into replacement characters as long as one character in it is
    incomplete, even those that were complete before. Here, therefore, the row is decoded as bytes first, as a
    byte-level tokenizer does it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        found = (tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        self._byte = {token: byte for byte, token in enumerate(found) if token is not None}
        """Byte of each byte-fallback token; empty if the tokenizer has no byte fallback."""
        if len(self._byte) < 256 or tokenizer.decode([next(t for t, b in self._byte.items() if b == 65)]) != "A":
            self._byte = {}
        self.special = {token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special}
        """Ids of the special tokens, which have no text."""

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
    """Decode the tokens of one answer as they arrive.

    A byte-level token may end in the middle of a character, and a stop string may begin in one token and end in a later
    one. Text that a later token could still change or cut off is therefore held back. The pieces joined are the whole
    answer, which ends before the first stop string.
    """

    def __init__(self, decode: TextDecoder, stops: Sequence[str] = (), prompt_ids: Sequence[int] = ()) -> None:
        """Start an answer.

        Args:
            decode: decoder of the tokenizer.
            stops: stop strings; the answer ends before the first of them.
            prompt_ids: tokens that the answer continues. A decoder may drop the space at the start of a text, but in
                the middle of a text the space must stay.
        """
        self._decode, self._stops = decode, stops
        self._ids: list[int] = list(prompt_ids[-CONTEXT:])
        """The newest tokens only, so that the time per token does not grow with the answer."""
        self._seen = len(decode(self._ids))
        """Number of characters of these tokens' text that have been processed."""
        self._held = ""
        """Text that was decoded but not released yet."""
        self.stopped = False
        """Whether a stop string has come: no more tokens are wanted."""

    @property
    def at_start(self) -> bool:
        """Whether no token with a text comes before the next one."""
        return self._decode.special.issuperset(self._ids)

    def push(self, token: int) -> str:
        """Add a token and return the text that is now certain; often empty."""
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
        """Return the rest of the text after the last token."""
        return "" if self.stopped else self._release(self._taken(self._decode(self._ids)), final=True)

    def _taken(self, text: str) -> str:
        """Return the text that is not released yet, including what is new in the text of the newest tokens."""
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
    """Return the length of the longest suffix of the text with which a stop string may begin."""
    longest = max(map(len, stops), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0


def shown(part: bytes) -> str:
    """Return a token as clients read it: its text, or "bytes:" and its bytes in hexadecimal if they are no complete
    characters."""
    try:
        return part.decode()
    except UnicodeDecodeError:
        return f"bytes:{part.hex()}"


class TokenBytes:
    """The UTF-8 bytes that each token stands for by itself, in the middle of a text; computed once per token."""

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
