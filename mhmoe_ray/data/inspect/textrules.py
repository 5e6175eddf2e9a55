"""What a text tells by itself of being damaged or out of place: one small function a rule, entered in RULES."""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

from mhmoe_ray.data import domains
from mhmoe_ray.data.domains import subfolder_of


class Seen(NamedTuple):
    """A document as rules see it."""

    text: str
    words: list[str]
    """`text.split()`."""
    language: str
    """As its record names it, else `languages.UNNAMED`."""
    folder_language: str
    """As its subfolder is named."""
    special: re.Pattern[str]
    """The tokenizer's special tokens."""


class TextRule(NamedTuple):
    check: Callable[[Seen], str | None]
    """What it saw, in a few characters; None if all is well."""
    says: str
    fix: str


MOST_OF = 0.8
"""A share of a text's characters that is nearly all of it."""
LONG_WORD = 1000
FEW_LETTERS = 0.25
SEVERAL = 3
"""Fewer marks of another encoding, or tags, can be meant."""
SHOWN = 40
"""Characters of an example."""


def _repeated_line(seen: Seen) -> str | None:
    lines = seen.text.splitlines()
    if len(lines) < 5 or len(set(lines)) > len(lines) // 2:
        return None
    line, times = max(Counter(filter(None, map(str.strip, lines))).items(), key=lambda item: len(item[0]) * item[1])
    return f"{times:,} times {_shown(line)}" if times > 1 and len(line) * times > MOST_OF * _inked(seen) else None


def _long_word(seen: Seen) -> str | None:
    """In ASCII only: some scripts do without spaces."""
    word = next((w for w in seen.words if len(w) > LONG_WORD and w.isascii()), None)
    return f"{len(word):,} characters: {_shown(word)}" if word else None


def _few_letters(seen: Seen) -> str | None:
    letters = sum(map(str.isalpha, seen.text))
    few = letters < FEW_LETTERS * _inked(seen)
    return f"{letters:,} of {_inked(seen):,} characters: {_shown(seen.text)}" if few else None


def _replaced(seen: Seen) -> str | None:
    return _around(seen.text, re.search("\ufffd", seen.text))


# A byte of UTF-8 that goes on, as Latin-1 and as Windows-1252 show it; without letters, which do follow one another.
_ON = "".join(
    character
    for byte in range(0x80, 0xC0)
    for character in {chr(byte), bytes([byte]).decode("cp1252", "ignore")}
    if not character.isalpha()
)
# First bytes of letters of Latin, Greek, Cyrillic, Hebrew and Arabic; and, of three bytes, of the rest.
_MOJIBAKE = re.compile(f"[\xc2-\xc5\xce-\xd1\xd7-\xdb][{_ON}]|[\xe0-\xef][{_ON}][{_ON}]|\xf0[{_ON}][{_ON}][{_ON}]")


def _mojibake(seen: Seen) -> str | None:
    found = [match for match, _ in zip(_MOJIBAKE.finditer(seen.text), range(SEVERAL), strict=False)]
    return _around(seen.text, found[0]) if len(found) == SEVERAL else None


_CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f]")  # without tab, line and page breaks


def _control(seen: Seen) -> str | None:
    return _around(seen.text, _CONTROL.search(seen.text))


_HTML = re.compile(
    r"</(?:a|b|body|div|head|html|i|li|p|script|span|style|table|td|tr|ul)>|&(?:nbsp|amp|lt|gt|quot|#\d+);"
)


def _html(seen: Seen) -> str | None:
    found = [match for match, _ in zip(_HTML.finditer(seen.text), range(SEVERAL), strict=False)]
    return _around(seen.text, found[0]) if len(found) == SEVERAL else None


def _special_token(seen: Seen) -> str | None:
    return _around(seen.text, seen.special.search(seen.text))


def _language(seen: Seen) -> str | None:
    named = seen.language and seen.folder_language
    return f"its record says {seen.language}" if named and seen.language != seen.folder_language else None


RULES: dict[str, TextRule] = {
    "repeated-line": TextRule(
        _repeated_line, "nearly all of it is one line again and again", "leave such documents out"
    ),
    "long-word": TextRule(
        _long_word, f"a word of over {LONG_WORD:,} ASCII characters", "cut out base64 and binary rests"
    ),
    "few-letters": TextRule(
        _few_letters, f"under {FEW_LETTERS:.0%} of its characters are letters", "see if it is text at all"
    ),
    "replacement-character": TextRule(
        _replaced, "it holds U+FFFD, which stands for lost characters", "decode the original with its encoding"
    ),
    "mojibake": TextRule(
        _mojibake, "UTF-8 that was read as Latin-1", "text.encode('cp1252').decode('utf-8') mends most of it"
    ),
    "control-characters": TextRule(_control, "it holds control characters", "strip them"),
    "html": TextRule(_html, "it holds tags or entities of HTML", "extract the text, unless it is code"),
    "special-token": TextRule(
        _special_token,
        "it spells out a special token, which is encoded as these letters",
        "cut the text there if the token was meant, else leave it",
    ),
    "language": TextRule(
        _language, "its record names another language than its folder", "correct the one or the other"
    ),
}
"""By name."""


def any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Matches any of these, none if there are none."""
    return re.compile("|".join(map(re.escape, tokens)) or "(?!)")


def broken_by(text: str, words: list[str], language: str, domain: str, special: re.Pattern[str]) -> dict[str, str]:
    """What each rule that a document breaks saw.

    Args:
        text: of the document.
        words: `text.split()`.
        language: as its record names it.
        domain: source/subfolder.
        special: `any_of` the tokenizer's special tokens.
    """
    seen = Seen(text, words, language, domains.of_folder(subfolder_of(domain)), special)
    return {name: saw for name, rule in RULES.items() if (saw := rule.check(seen)) is not None}


def _inked(seen: Seen) -> int:
    """Characters that are not white space."""
    return sum(map(len, seen.words))


def _around(text: str, match: re.Match[str] | None) -> str | None:
    if match is None:
        return None
    return _shown(text[max(0, match.start() - SHOWN // 4) :])


def _shown(text: str) -> str:
    """The beginning, printable."""
    return repr(text[:SHOWN])
