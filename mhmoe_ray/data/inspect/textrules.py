"""Rules that find signs of damaged or misplaced text in one document; RULES registers one function for each."""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import islice
from typing import NamedTuple


class TextView(NamedTuple):
    """Document as the rules see it: its text and values that several rules need."""

    text: str
    words: list[str]
    """The text's words, `text.split()`."""
    language: str
    """Language that the document's record names, or `domains.NO_LANGUAGE`."""
    folder_language: str
    """Language that the name of the subfolder stands for, or `domains.NO_LANGUAGE`."""
    special: re.Pattern[str]
    """Pattern of the tokenizer's special tokens, from `any_token_pattern`."""


class TextRule(NamedTuple):
    """Rule that the text of a document should pass, with a message about documents that break it and advice."""

    check: Callable[[TextView], str | None]
    """Function that returns short evidence that a document breaks the rule, or None."""
    message: str
    fix: str


NEARLY_ALL = 0.8
"""Share of a text's visible characters above which the repetitions of a line are nearly all of the text."""
MAX_WORD_LENGTH = 1000
MIN_LETTER_SHARE = 0.25
MIN_MATCHES = 3
"""Number of encoding errors or HTML tags from which a text breaks a rule; fewer can be intended."""
EXAMPLE_CHARACTERS = 40


def _repeated_line(view: TextView) -> str | None:
    lines = view.text.splitlines()
    if len(lines) < 5 or len(set(lines)) > len(lines) // 2:
        return None
    # Take the line whose repetitions have the most characters in all. The most frequent line may be a short one, which
    # repeats in sound text too.
    line, line_count = max(
        Counter(filter(None, map(str.strip, lines))).items(), key=lambda item: len(item[0]) * item[1]
    )
    is_nearly_all = line_count > 1 and len(line) * line_count > NEARLY_ALL * _visible_characters(view)
    return f"{line_count:,} times {_printable_start(line)}" if is_nearly_all else None


def _long_word(view: TextView) -> str | None:
    # Only ASCII words are checked, because sound text in a script without spaces seems to be one long word.
    word = next((w for w in view.words if len(w) > MAX_WORD_LENGTH and w.isascii()), None)
    return f"{len(word):,} characters: {_printable_start(word)}" if word else None


def _few_letters(view: TextView) -> str | None:
    letters, characters = sum(map(str.isalpha, view.text)), _visible_characters(view)
    if letters >= MIN_LETTER_SHARE * characters:
        return None
    return f"{letters:,} of {characters:,} characters: {_printable_start(view.text)}"


# These are the characters that continuation bytes of UTF-8 become in Latin-1 and in Windows-1252. Letters are excluded,
# because in real text a letter often follows one of the letters that begin the pattern below.
_TAIL = "".join(
    character
    for byte in range(0x80, 0xC0)
    for character in {chr(byte), bytes([byte]).decode("cp1252", "ignore")}
    if not character.isalpha()
)
# The first alternative begins with the first byte of Latin, Greek, Cyrillic, Hebrew and Arabic letters, which have two
# bytes in UTF-8. The others begin with the first byte of characters of three and of four bytes.
_MOJIBAKE = re.compile(
    f"[\xc2-\xc5\xce-\xd1\xd7-\xdb][{_TAIL}]|[\xe0-\xef][{_TAIL}][{_TAIL}]|\xf0[{_TAIL}][{_TAIL}][{_TAIL}]"
)


# Tabs, line breaks and page breaks occur in sound text, so the pattern does not match them.
_CONTROL_CHARACTER = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f]")


_HTML = re.compile(
    r"</(?:a|b|body|div|head|html|i|li|p|script|span|style|table|td|tr|ul)>|&(?:nbsp|amp|lt|gt|quot|#\d+);"
)


def _matches(pattern: re.Pattern[str], count: int = 1) -> Callable[[TextView], str | None]:
    """Return a check that a text has fewer than `count` matches of a pattern."""

    def check(view: TextView) -> str | None:
        matches = list(islice(pattern.finditer(view.text), count))
        return _example_at(view.text, matches[0]) if len(matches) == count else None

    return check


def _special_token(view: TextView) -> str | None:
    return _matches(view.special)(view)


def _language(view: TextView) -> str | None:
    has_languages = view.language and view.folder_language
    return f"its record says {view.language}" if has_languages and view.language != view.folder_language else None


RULES: dict[str, TextRule] = {
    "repeated-line": TextRule(_repeated_line, "nearly all of it is one repeated line", "leave such documents out"),
    "long-word": TextRule(
        _long_word, f"a word of over {MAX_WORD_LENGTH:,} ASCII characters", "remove Base64 and binary data"
    ),
    "few-letters": TextRule(
        _few_letters, f"under {MIN_LETTER_SHARE:.0%} of its characters are letters", "check whether it is text"
    ),
    "replacement-character": TextRule(
        _matches(re.compile("\ufffd")),
        "it holds U+FFFD, which stands for lost characters",
        "decode the original with its encoding",
    ),
    "mojibake": TextRule(
        _matches(_MOJIBAKE, MIN_MATCHES),
        "UTF-8 that was read as Latin-1",
        "text.encode('cp1252').decode('utf-8') repairs most of it",
    ),
    "control-characters": TextRule(_matches(_CONTROL_CHARACTER), "it holds control characters", "strip them"),
    "html": TextRule(
        _matches(_HTML, MIN_MATCHES), "it holds tags or entities of HTML", "extract the text, unless it is code"
    ),
    "special-token": TextRule(
        _special_token,
        "it spells out a special token, which is encoded as these letters",
        "cut the text there if the token was intended, else leave it",
    ),
    "language": TextRule(
        _language, "its record names another language than its folder", "correct the record or the folder"
    ),
}


def any_token_pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches any of these tokens; without tokens it matches nothing."""
    return re.compile("|".join(map(re.escape, tokens)) or "(?!)")


def broken_rules(view: TextView) -> dict[str, str]:
    """Return the evidence of each rule of RULES that a document breaks, by name."""
    return {name: evidence for name, rule in RULES.items() if (evidence := rule.check(view)) is not None}


def _visible_characters(view: TextView) -> int:
    """Return the number of characters that are not white space."""
    return sum(map(len, view.words))


def _example_at(text: str, match: re.Match[str]) -> str:
    return _printable_start(text[max(0, match.start() - EXAMPLE_CHARACTERS // 4) :])


def _printable_start(text: str) -> str:
    return repr(text[:EXAMPLE_CHARACTERS])
