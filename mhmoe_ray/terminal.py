"""Texts for a terminal: notes of present activities, and escapes for texts of others.

A terminal obeys control characters, for example to set its title.
"""

import re
from typing import Self

# Besides control characters: marks that change the direction of text, and halves of surrogate pairs.
_OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_COLOUR = re.compile(r"(\x1b\[[0-9;]*m)")


def printable(text: str) -> str:
    """Return a text in which everything that a terminal would obey, except tabs and line breaks, is an escape."""
    return _OBEYED.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def printable_colours(text: str) -> str:
    """Return a text as `printable` does, but with its colours."""
    return "".join(part if i % 2 else printable(part) for i, part in enumerate(_COLOUR.split(text)))


def without_colours(text: str) -> str:
    """Return a text without the terminal codes that colour it."""
    return _COLOUR.sub("", text)


class Activity(str):
    """Note that says what is done now, in the present tense: a terminal shows the newest one only, with a clock."""

    text: str
    details: str
    """Counts and other figures that change while the activity goes on; empty if there are none."""
    done_count: int
    total_count: int | None
    """Amount of work, of which `done_count` is done, to estimate the remaining time; None if it is unknown."""

    def __new__(cls, text: str, details: str = "", done_count: int = 0, total_count: int | None = None) -> Self:
        activity = super().__new__(cls, f"{text} {details}".rstrip())
        activity.text, activity.details = text, details
        activity.done_count, activity.total_count = done_count, total_count
        return activity
