"""Source files, filtered as RedPajama filters GitHub's."""

import re
from collections.abc import Iterator

from mhmoe_ray.data.corpus.readers import Document

_ABOUT_RIGHTS = re.compile(r"copyright|licen[cs]e|SPDX", re.IGNORECASE)
_COMMENT_LINES = re.compile(r"\A(?:[ \t]*(?://|#).*\n)+\s*")
_COMMENT_BLOCK = re.compile(r"\A\s*/\*.*?\*/\s*", re.DOTALL)


def read_code(content: bytes) -> Iterator[Document]:
    """The file as one paragraph, without the notice of its rights at the top, if it is worth reading."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return
    for first in (_COMMENT_BLOCK, _COMMENT_LINES):
        found = first.match(text)
        if found and _ABOUT_RIGHTS.search(found[0]):
            text = text[found.end() :]
    if worth_reading(text):
        yield Document("", [text.strip("\n")])


def worth_reading(text: str) -> bool:
    """No line over 1,000 characters, at most 100 on average, a quarter of them letters or digits."""
    lengths = [len(line) for line in text.splitlines()] or [0]
    return (
        len(text) >= 200
        and max(lengths) <= 1000
        and sum(lengths) <= 100 * len(lengths)
        and sum(c.isalnum() for c in text) >= len(text) / 4
    )
