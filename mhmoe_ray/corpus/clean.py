"""Cleaning of a corpus: it removes repeated text, and English text that was left in translations."""

import re
import unicodedata
from hashlib import blake2b

from mhmoe_ray.corpus.readers import CorpusDocument

MIN_DOCUMENT_BYTES = 300
"""Bytes of text below which a document is dropped, because it teaches little."""
MIN_PARAGRAPH_CHARS = 20
"""Number of characters below which a repeated paragraph is kept, such as the heading "Example"."""

# These words are frequent in any English sentence and rare in other languages. Some of them are words of another
# language too ("in" and "will" are German), so one such word proves nothing and a share of them is needed.
_ENGLISH_WORD_LIST = "the and this that with you your are from when which will have not can if for of to in is"
_ENGLISH_WORDS = frozenset(_ENGLISH_WORD_LIST.split())
_MIN_ENGLISH_SHARE, _MIN_WORDS = 0.3, 5
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f\u00ad\u200b\ufeff\ud800-\udfff]")


class Cleaner:
    """Cleaner that removes repeated paragraphs from documents, and English text from translations.

    It must get the documents one after another, English originals before their translations. It removes paragraphs that
    an earlier document of the same domain or language has, as CCNet does (Wenzek et al., arXiv 1911.00359, section
    3.1). A document that loses more than half of its text is dropped as a whole.
    """

    def __init__(self) -> None:
        self._digests_by_domain: dict[str, set[bytes]] = {}
        self._english_digests = set[bytes]()

    def clean(self, document: CorpusDocument, domain: str, is_translation: bool) -> str | None:
        """Return a document's cleaned text, with paragraphs joined by newlines; None if too little text remains.

        No paragraph occurs twice in a domain or language (`domain`). English paragraphs of a translation are removed.
        """
        domain_digests, document_digests = self._digests_by_domain.setdefault(domain, set()), set[bytes]()
        original_length, clean_paragraphs = 0, list[str]()
        for i, paragraph in enumerate(map(normalise_text, document.paragraphs)):
            digest, is_title = _paragraph_digest(paragraph), i == 0 and len(document.paragraphs) > 1
            original_length += len(paragraph)
            if is_translation and (self._is_untranslated(paragraph) or is_english(paragraph)):
                continue
            if len(paragraph) >= MIN_PARAGRAPH_CHARS:
                # A title may repeat a paragraph of an earlier document, because a link to this document may have shown
                # its title there.
                if digest in document_digests or (digest in domain_digests and not is_title):
                    continue
                document_digests.add(digest)
            if not is_translation:
                self._english_digests.update(map(_paragraph_digest, paragraph.splitlines()))
            clean_paragraphs.append(paragraph)
        text = "\n".join(clean_paragraphs)
        # A document that lost more than half of its text repeats another one, or is mostly untranslated.
        if len(text.encode()) < MIN_DOCUMENT_BYTES or 2 * len(text) < original_length:
            return None
        # The digests are added only here, because a dropped document must not remove its paragraphs from later
        # documents.
        domain_digests |= document_digests
        return text

    def _is_untranslated(self, paragraph: str) -> bool:
        """Return whether most lines of a paragraph occurred in earlier English documents."""
        # Most lines are enough, because a translator of a code listing may have translated only some comments.
        lines = paragraph.splitlines()
        return 2 * sum(_paragraph_digest(line) in self._english_digests for line in lines) > len(lines)


def normalise_text(text: str) -> str:
    """Return a text in form NFC, without control and other invisible characters and lone surrogates.

    Tabs and newlines stay, and non-breaking spaces become spaces.
    """
    return _INVISIBLE.sub("", unicodedata.normalize("NFC", text).replace("\xa0", " "))


def is_english(paragraph: str) -> bool:
    """Return whether a paragraph of at least `_MIN_WORDS` words is English, by its share of frequent English words."""
    words = re.findall(r"[^\W\d_]+", paragraph.lower())
    return len(words) >= _MIN_WORDS and sum(word in _ENGLISH_WORDS for word in words) >= _MIN_ENGLISH_SHARE * len(words)


def _paragraph_digest(paragraph: str) -> bytes:
    """Return a hash of a paragraph that ignores case and white space."""
    # Eight bytes keep the sets small. Among ten million paragraphs a collision has a chance of about 1 in 370,000.
    return blake2b(" ".join(paragraph.casefold().split()).encode(), digest_size=8).digest()
