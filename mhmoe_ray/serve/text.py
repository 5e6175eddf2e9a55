"""Tokens to text, in pieces that are never taken back."""

from collections.abc import Sequence

from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"


class TextStream:
    """Decodes the tokens of one answer as they come.

    A byte-level token may end in the middle of a character, and a stop string may begin in one token and end in a
    later one. So text that a later token could still change or cut away is held back. The pieces joined are the whole
    answer, which ends before the first stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._ids: list[int] = []
        self._sent = 0
        self.stopped = False
        """A stop string has come: no more tokens are wanted."""

    def push(self, token: int) -> str:
        """The text that is certain after one more token; often empty."""
        self._ids.append(token)
        text = self._decode()
        # The bytes of a character that is not whole yet decode to one replacement character at the very end.
        return self._release(text.removesuffix(REPLACEMENT), final=False)

    def finish(self) -> str:
        """What is left when no more tokens come."""
        return "" if self.stopped else self._release(self._decode(), final=True)

    def _decode(self) -> str:
        # All tokens, not the newest ones: a decoder may treat the start of a text in its own way.
        return self._tokenizer.decode(self._ids)

    def _release(self, text: str, final: bool) -> str:
        starts = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if starts:
            self.stopped = True
            end = min(starts)
        else:
            end = len(text) if final else len(text) - _open_stop(text, self._stops)
        piece, self._sent = text[self._sent : end], max(self._sent, end)
        return piece


def _open_stop(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of the text with which a stop string may have begun."""
    longest = max(map(len, stops), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
