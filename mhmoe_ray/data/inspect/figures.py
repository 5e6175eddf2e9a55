"""Figures of documents; they add up in any order and grouping, so the result does not depend on how work is split.

Lengths are counted in histograms with 16 bins an octave.

Each length up to 32 has a bin of its own; above that, the width of a bin is at most a sixteenth of its length. So
counts by octave are exact, and a quantile is at most a sixteenth below the true one.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from mhmoe_ray.data.sources import Tally

STEPS = 4  # halvings of an octave


def bin_of(length: int) -> int:
    """Return the histogram bin of a length: the smallest length that falls into the same bin."""
    shift = max(0, length.bit_length() - 1 - STEPS)
    return length >> shift << shift


def quantile(bins: Mapping[int, int], share: float) -> int:
    """Return the smallest bin that, together with all bins below it, holds at least `share` of all entries.

    Return 0 if there are no entries.
    """
    wanted, seen = share * sum(bins.values()), 0
    for lowest in sorted(bins):
        seen += bins[lowest]
        if seen >= wanted:
            return lowest
    return 0


def octaves(bins: Mapping[int, int]) -> dict[int, int]:
    """Return counts by octave, the largest power of two that is at most the length; length 0 has a count of its own.

    Octaves are in ascending order and without gaps: an empty one in between has count 0.
    """
    found: Counter[int] = Counter()
    for lowest, count in bins.items():
        found[1 << lowest.bit_length() - 1 if lowest else 0] += count
    if not found:
        return {}
    result, octave = {0: found[0]} if found[0] else {}, min((o for o in found if o), default=1)
    while octave <= max(found):
        result[octave] = found[octave]
        octave *= 2
    return result


EXAMPLES = 3
"""Number of examples kept for each finding."""
UNSPACED = 0.3
"""Share of a text's characters in scripts without spaces between words, from which on counting words is meaningless."""
_UNSPACED = re.compile(
    "["
    "\u0e00-\u0fff"  # Thai, Lao, Tibetan
    "\u1000-\u109f"  # Myanmar
    "\u1780-\u17ff"  # Khmer
    "\u3040-\u30ff"  # kana
    "\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese characters
    "]+"
)


class Place(NamedTuple):
    path: str
    line: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


@dataclass
class Finding:
    """Documents of one domain that break one rule: their number and some examples."""

    count: int = 0
    examples: list[tuple[Place, str]] = field(default_factory=list)
    """The first examples in the order of places, each with what was seen there."""

    def add(self, count: int, examples: list[tuple[Place, str]]) -> None:
        self.count += count
        self.examples = sorted([*self.examples, *examples])[:EXAMPLES]


@dataclass
class Figures:
    """Figures of the documents of one domain and language."""

    documents: int = 0
    bytes: int = 0
    """Bytes of the documents' texts in UTF-8."""
    characters: int = 0
    words: int = 0
    """Number of words: runs of characters without white space, by `str.split`, as Gopher counts them."""
    unspaced: int = 0
    """Number of characters in scripts without spaces between words."""
    held_out: int = 0
    """Number of documents that are held out for validation."""
    tokens: int = 0
    """Number of tokens of the texts alone, without start tokens; 0 without a tokenizer."""
    unknown: int = 0
    """Number of those tokens that are the tokenizer's unknown token."""
    lengths: Counter[int] = field(default_factory=Counter)
    """Histogram of text lengths in characters, by `bin_of`."""
    token_lengths: Counter[int] = field(default_factory=Counter)
    longest: int = 0
    """Length of the longest document in characters."""
    longest_at: Place | None = None

    def count(self, text: str, size: int, words: int, tokens: int | None, held_out: bool, place: Place) -> None:
        """Add one document to the figures.

        Args:
            text: the document's text.
            size: bytes of the text in UTF-8.
            words: number of words in the text.
            tokens: number of tokens of the text; None without a tokenizer.
            held_out: whether the document is held out for validation.
            place: the place where the document begins.
        """
        characters = len(text)
        self.documents += 1
        self.bytes += size
        self.characters += characters
        self.words += words
        self.unspaced += 0 if text.isascii() else sum(map(len, _UNSPACED.findall(text)))
        self.held_out += held_out
        self.lengths[bin_of(characters)] += 1
        if tokens is not None:
            self.tokens += tokens
            self.token_lengths[bin_of(tokens)] += 1
        self._lengthen(characters, place)

    def __iadd__(self, other: "Figures") -> "Figures":
        for name in ("documents", "bytes", "characters", "words", "unspaced", "held_out", "tokens", "unknown"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.lengths += other.lengths
        self.token_lengths += other.token_lengths
        if other.longest_at:
            self._lengthen(other.longest, other.longest_at)
        return self

    def _lengthen(self, characters: int, place: Place) -> None:
        """Update the longest document; of several with the same length, the first in the order of places is kept."""
        if self.longest_at is None or (-characters, place) < (-self.longest, self.longest_at):
            self.longest, self.longest_at = characters, place

    @property
    def bytes_per_token(self) -> float | None:
        return self.bytes / self.tokens if self.tokens else None

    @property
    def tokens_per_character(self) -> float | None:
        return self.tokens / self.characters if self.tokens else None

    @property
    def tokens_per_word(self) -> float | None:
        """Fertility as it is usually defined; None without tokens, or where words are not separated by spaces."""
        spaced = self.unspaced < UNSPACED * self.characters
        return self.tokens / self.words if self.tokens and spaced else None


@dataclass
class DomainSurvey:
    files: int = 0
    stored_bytes: int = 0
    """Bytes of the files as stored, by the sizes in the file listing."""
    damaged: int = 0
    """Number of files of which a part is lost."""
    quarantined: Counter[str] = field(default_factory=Counter)
    """Number of quarantined items, by reason."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Number of documents that the source's filters dropped, by rule."""
    languages: dict[str, Figures] = field(default_factory=dict)
    """Figures by language: the one that a document's record names, else that of the subfolder."""
    findings: dict[str, Finding] = field(default_factory=dict)
    """Findings by rule of textrules.py, or by reason of quarantine."""

    def read(self, size: int, tally: Tally) -> None:
        """Add one file that was read to its end: its size in bytes and the tally of reading it."""
        self.files += 1
        self.stored_bytes += size
        self.damaged += tally.damaged
        self.quarantined.update({str(reason): n for reason, n in tally.bad.items()})
        self.dropped.update(tally.dropped)

    def __iadd__(self, other: "DomainSurvey") -> "DomainSurvey":
        self.files += other.files
        self.stored_bytes += other.stored_bytes
        self.damaged += other.damaged
        self.quarantined += other.quarantined
        self.dropped += other.dropped
        for language, figures in other.languages.items():
            self.languages.setdefault(language, Figures())
            self.languages[language] += figures
        for rule, finding in other.findings.items():
            self.findings.setdefault(rule, Finding()).add(finding.count, finding.examples)
        return self

    @property
    def whole(self) -> Figures:
        """Figures of all documents of the domain, in all languages."""
        return total(self.languages.values())


def total(parts: Iterable[Figures]) -> Figures:
    result = Figures()
    for part in parts:
        result += part
    return result
