"""Rules that find signs of damaged or misplaced text in one document; one small function a rule, registered in
RULES."""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

from mhmoe_ray.data import domains
from mhmoe_ray.data.domains import subfolder_of


class Seen(NamedTuple):
    """A document in the form in which rules check it."""

    text: str
    words: list[str]
    """The words of the text, `text.split()`."""
    language: str
    """Language that the document's record names; `domains.UNNAMED` if it names none."""
    folder_language: str
    """Language that the name of the subfolder stands for; `domains.UNNAMED` if it stands for none."""
    special: re.Pattern[str]
    """Pattern that matches any of the tokenizer's special tokens."""


class TextRule(NamedTuple):
    check: Callable[[Seen], str | None]
    """Function that returns what breaks the rule, in a few characters; None if the document passes."""
    says: str
    fix: str


MOST_OF = 0.8
"""Share of a text's characters from which on they count as nearly all of it."""
LONG_WORD = 1000
FEW_LETTERS = 0.25
SEVERAL = 3
"""Number of encoding errors, or of tags, from which a text breaks a rule; fewer can be intended."""
SHOWN = 40
"""Number of characters shown of an example."""


def _repeated_line(seen: Seen) -> str | None:
    lines = seen.text.splitlines()
    if len(lines) < 5 or len(set(lines)) > len(lines) // 2:
        return None
    line, times = max(Counter(filter(None, map(str.strip, lines))).items(), key=lambda item: len(item[0]) * item[1])
    return f"{times:,} times {_shown(line)}" if times > 1 and len(line) * times > MOST_OF * _inked(seen) else None


def _long_word(seen: Seen) -> str | None:
    """Find a word that is too long, in ASCII only, since some scripts have no spaces."""
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
"""The rules by name."""


def any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches any of these tokens; without tokens it matches nothing."""
    return re.compile("|".join(map(re.escape, tokens)) or "(?!)")


def broken_by(text: str, words: list[str], language: str, domain: str, special: re.Pattern[str]) -> dict[str, str]:
    """Return, for each rule that a document breaks, what breaks it.

    Args:
        text: the document's text.
        words: the words of the text, `text.split()`.
        language: the language that the document's record names.
        domain: the document's domain, source/subfolder.
        special: the pattern `any_of` of the tokenizer's special tokens.
    """
    seen = Seen(text, words, language, domains.of_folder(subfolder_of(domain)), special)
    return {name: saw for name, rule in RULES.items() if (saw := rule.check(seen)) is not None}


def _inked(seen: Seen) -> int:
    """Return the number of characters that are not white space."""
    return sum(map(len, seen.words))


def _around(text: str, match: re.Match[str] | None) -> str | None:
    if match is None:
        return None
    return _shown(text[max(0, match.start() - SHOWN // 4) :])


def _shown(text: str) -> str:
    """Return the beginning of a text in printable form."""
    return repr(text[:SHOWN])
