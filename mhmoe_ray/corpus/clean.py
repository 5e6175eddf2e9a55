"""Cleaning of a corpus: it removes repeated text, and English that was left in translations."""

import re
import unicodedata
from hashlib import blake2b

from mhmoe_ray.corpus.readers import Document

SHORTEST = 300
"""Bytes of text below which a document is dropped, since it teaches little."""
SHORT_PARAGRAPH = 20
"""Characters below which a paragraph may be repeated, as headings such as "Example" are."""

# Frequent in any English sentence and rare in other languages, in which single ones of them are words too.
_ENGLISH_WORDS = "the and this that with you your are from when which will have not can if for of to in is"
_ENGLISH = frozenset(_ENGLISH_WORDS.split())
_ENGLISH_SHARE, _FEWEST_WORDS = 0.3, 5
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f\u00ad\u200b\ufeff\ud800-\udfff]")


class Cleaner:
    """Cleaner that removes text it has seen before; feed it English before the translations of it.

    As in CCNet (Wenzek et al., arXiv 1911.00359, section 3.1), paragraphs seen before in the same domain or language
    are dropped. A document that loses more than half of its text this way is a variant of another one and is dropped as
    a whole.
    """

    def __init__(self) -> None:
        self._seen: dict[str, set[bytes]] = {}
        self._english = set[bytes]()

    def clean(self, document: Document, domain: str, translated: bool) -> str | None:
        """Return the document's cleaned text, with a line break after each paragraph; None if too little of it is left.

        Args:
            document: the document to clean.
            domain: the domain within which no paragraph may occur twice.
            translated: whether the document is not English, so that English in it was left untranslated.
        """
        seen, new = self._seen.setdefault(domain, set()), set[bytes]()
        before, kept = 0, list[str]()
        for i, paragraph in enumerate(map(normalise, document.paragraphs)):
            key, is_title = _digest(paragraph), i == 0 and len(document.paragraphs) > 1
            before += len(paragraph)
            if translated and (self._known_in_english(paragraph) or is_english(paragraph)):
                continue
            if len(paragraph) >= SHORT_PARAGRAPH:
                if key in new or (key in seen and not is_title):  # links to it may have named a title before
                    continue
                new.add(key)
            if not translated:
                self._english.update(map(_digest, paragraph.splitlines()))
            kept.append(paragraph)
        text = "\n".join(kept)
        if len(text.encode()) < SHORTEST or 2 * len(text) < before:
            return None
        seen |= new
        return text

    def _known_in_english(self, paragraph: str) -> bool:
        """Return whether most lines of a paragraph were seen in English.

        Most lines are enough: in a code listing, a translator may have changed only some comments.
        """
        lines = paragraph.splitlines()
        return 2 * sum(_digest(line) in self._english for line in lines) > len(lines)


def normalise(text: str) -> str:
    """Normalise a text: compose characters (NFC), and remove invisible characters and lone surrogates.

    Non-breaking spaces become spaces.
    """
    return _INVISIBLE.sub("", unicodedata.normalize("NFC", text).replace("\xa0", " "))


def is_english(paragraph: str) -> bool:
    """Return whether a paragraph among paragraphs of another language reads as English."""
    words = re.findall(r"[^\W\d_]+", paragraph.lower())
    return len(words) >= _FEWEST_WORDS and sum(word in _ENGLISH for word in words) >= _ENGLISH_SHARE * len(words)


def _digest(paragraph: str) -> bytes:
    """Return a hash that is equal for paragraphs that differ only in case and white space."""
    return blake2b(" ".join(paragraph.casefold().split()).encode(), digest_size=8).digest()
