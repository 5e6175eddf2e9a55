"""The detokenizer: it turns tokens into text that can be streamed, and never retracts text."""

import re
from collections.abc import Sequence
from itertools import groupby

from tokenizers import Tokenizer

from mhmoe_ray.data.tokenizer.tiktoken import BYTE_OF_LETTER

REPLACEMENT = "\ufffd"
# A decoder may treat the start of a text specially, so this many preceding tokens are decoded together with new ones.
CONTEXT_TOKENS = 8


class TextDecoder:
    """Decoder of token ids into text; each further token only adds text, or changes an incomplete last character.

    With byte fallback (LLaMA's, Mixtral's), tokens <0x00> to <0xFF> stand for text that the vocabulary lacks. The
    library `tokenizers` turns all consecutive ones into replacement characters while one character is incomplete, so
    this decoder turns them into bytes first.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        byte_token_ids = (tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        self._byte_by_token = {token: byte for byte, token in enumerate(byte_token_ids) if token is not None}
        """Byte by the id of each byte-fallback token, if there are any."""
        # A vocabulary may have tokens named <0x00> to <0xFF> although its decoder does not turn them into bytes. The
        # test is that the token of byte 65 decodes to "A".
        if (
            len(self._byte_by_token) < 256
            or tokenizer.decode([next(t for t, b in self._byte_by_token.items() if b == 65)]) != "A"
        ):
            self._byte_by_token = {}
        self.special_texts = {
            token: added_token.content
            for token, added_token in tokenizer.get_added_tokens_decoder().items()
            if added_token.special
        }
        """Text by the id of each special token, which is not part of a decoded text."""

    def __call__(self, token_ids: Sequence[int]) -> str:
        if self._byte_by_token.keys().isdisjoint(token_ids):
            return self._tokenizer.decode(token_ids)
        parts: list[str] = []
        for are_bytes, row in groupby(
            (t for t in token_ids if t not in self.special_texts), self._byte_by_token.__contains__
        ):
            if are_bytes:
                parts.append(bytes(self._byte_by_token[t] for t in row).decode("utf-8", "replace"))
            else:
                parts.extend(token for t in row if (token := self._tokenizer.id_to_token(t)) is not None)
        return str(self._tokenizer.decoder.decode(parts))


class TextStream:
    """Decoder of one answer's tokens as they arrive.

    The stream holds back text that a later token could change or cut off, because tokens may end in the middle of a
    character or a stop string. The texts of `push` and `finish` are together the answer up to its first stop string.
    """

    def __init__(self, decode: TextDecoder, stop_strings: Sequence[str] = (), prompt_ids: Sequence[int] = ()) -> None:
        """Start to decode the answer to a prompt, after which a space at the start of the answer must stay."""
        self._decode, self._stop_strings = decode, stop_strings
        self._token_ids: list[int] = list(prompt_ids[-CONTEXT_TOKENS:])
        """The newest tokens; older ones are dropped, so that the time per token stays constant."""
        self._processed_length = len(decode(self._token_ids))
        """Number of characters of the newest tokens' text that were returned or are pending."""
        self._pending_text = ""
        """Decoded text that a later token may turn into a stop string."""
        self.is_stopped = False

    @property
    def at_start(self) -> bool:
        """True as long as all tokens so far are special tokens, without text."""
        return self._decode.special_texts.keys() >= set(self._token_ids)

    def push(self, token: int) -> str:
        """Add a token, and return the next text that no later token can change, if any."""
        self._token_ids.append(token)
        text = self._decode(self._token_ids)
        # An incomplete character at the end of the text is decoded to one replacement character, which is held back.
        piece = self._release_text(self._unreleased_text(text.removesuffix(REPLACEMENT)), is_final=False)
        if len(self._token_ids) >= 4 * CONTEXT_TOKENS and not text.endswith(REPLACEMENT):
            # Some tokens stay, because a decoder may treat the start of a text in its own way.
            self._token_ids = self._token_ids[-CONTEXT_TOKENS:]
            self._processed_length = len(self._decode(self._token_ids))
        return piece

    def finish(self) -> str:
        """Return the text that is held back after the last token; empty after a stop string."""
        return (
            ""
            if self.is_stopped
            else self._release_text(self._unreleased_text(self._decode(self._token_ids)), is_final=True)
        )

    def _unreleased_text(self, text: str) -> str:
        """Return the held-back text with the new part of the newest tokens' text, which then is processed."""
        new_text, self._processed_length = text[self._processed_length :], max(self._processed_length, len(text))
        return self._pending_text + new_text

    def _release_text(self, text: str, is_final: bool) -> str:
        """Return the part of a text that no later token can change, and hold back the rest.

        A stop string ends the stream, and the returned part ends before it.
        """
        starts = [position for stop in self._stop_strings if (position := text.find(stop)) >= 0]
        if starts:
            self.is_stopped = True
            end = min(starts)
        else:
            end = len(text) if is_final else len(text) - _partial_stop_length(text, self._stop_strings)
        self._pending_text = text[end:]
        return text[:end]


def _partial_stop_length(text: str, stop_strings: Sequence[str]) -> int:
    """Return the length of the longest suffix that begins a stop string."""
    longest = max(map(len, stop_strings), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stop_strings):
            return length
    return 0


def format_token(token_bytes: bytes) -> str:
    """Return a token as text for clients; incomplete characters give "bytes:" and hexadecimal bytes."""
    try:
        return token_bytes.decode()
    except UnicodeDecodeError:
        return f"bytes:{token_bytes.hex()}"


class TokenBytes:
    """Mapping of each token to its UTF-8 bytes in the middle of a text; computed once per token."""

    def __init__(self, tokenizer: Tokenizer, decode: TextDecoder) -> None:
        self._tokenizer, self._decode = tokenizer, decode
        # Tokens are decoded after these ids, because a decoder may drop a space at the start of a text, but not after
        # another token.
        self._prefix_ids = tokenizer.encode("a", add_special_tokens=False).ids
        self._bytes_by_token: dict[int, bytes] = {}

    def __getitem__(self, token: int) -> bytes:
        if token not in self._bytes_by_token:
            self._bytes_by_token[token] = self._compute_bytes(token)
        return self._bytes_by_token[token]

    def _compute_bytes(self, token: int) -> bytes:
        """Compute a token's bytes from the text that it adds after another token, or from the vocabulary."""
        # The decoder leaves out special tokens, so their bytes cannot be found by decoding.
        if token in self._decode.special_texts:
            return self._decode.special_texts[token].encode()
        text = self._decode([*self._prefix_ids, token])[len(self._decode(self._prefix_ids)) :]
        if REPLACEMENT in text:
            token_name = self._tokenizer.id_to_token(token) or ""
            if byte_name := re.fullmatch("<0x([0-9A-Fa-f]{2})>", token_name):
                return bytes.fromhex(byte_name[1])
            if BYTE_OF_LETTER.keys() >= set(token_name):
                return bytes(BYTE_OF_LETTER[letter] for letter in token_name)
        # If the text still has a U+FFFD here, it is the token's own text: a vocabulary may have this character.
        return text.encode()
