"""Figures (statistics) of documents: counts, and histograms of lengths.

Figures can be added up in any order and grouping, so the result is the same for any division of the work into tasks.

A histogram has 16 bins for each octave (the lengths from n to 2n - 1, for n a power of two), and a bin for each length
below 32. So counts by octave are exact, and a quantile is at most a sixteenth below the true one.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import NamedTuple

from mhmoe_ray.data.images.annotations import Annotation
from mhmoe_ray.data.sources import Tally

# An octave (the lengths from n to 2n) is halved four times, which gives 16 bins of a histogram.
OCTAVE_HALVINGS = 4


def histogram_bin(length: int) -> int:
    """Return the histogram bin of a length: the smallest length that falls into it."""
    shift = max(0, length.bit_length() - 1 - OCTAVE_HALVINGS)
    return length >> shift << shift


def quantile(bins: Mapping[int, int], share: float) -> int:
    """Return the smallest bin up to which a histogram's bins hold `share` of all entries; 0 without entries."""
    target_count, cumulative_count = share * sum(bins.values()), 0
    for bin_start in sorted(bins):
        cumulative_count += bins[bin_start]
        if cumulative_count >= target_count:
            return bin_start
    return 0


def octave_counts(bins: Mapping[int, int]) -> dict[int, int]:
    """Sum a histogram by octave, keyed by first length (0, 1, 2, 4, 8 ...), in ascending order and without gaps."""
    counts: Counter[int] = Counter()
    for bin_start, count in bins.items():
        counts[1 << bin_start.bit_length() - 1 if bin_start else 0] += count
    if not counts:
        return {}
    result, octave = {0: counts[0]} if counts[0] else {}, min((o for o in counts if o), default=1)
    while octave <= max(counts):
        result[octave] = counts[octave]
        octave *= 2
    return result


EXAMPLES = 3
MAX_UNSPACED_SHARE = 0.3
"""Share of characters in scripts without spaces from which a count of words is meaningless."""
_UNSPACED_SCRIPTS = re.compile(
    "["
    "\u0e00-\u0fff"  # Thai, Lao, Tibetan
    "\u1000-\u109f"  # Myanmar
    "\u1780-\u17ff"  # Khmer
    "\u3040-\u30ff"  # kana
    "\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese characters
    "]+"
)


class TextLocation(NamedTuple):
    """Location of a text: the path, and the number of its first line or row, from 1."""

    path: str
    line: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


@dataclass
class Finding:
    """Documents of one domain that break one rule, with examples."""

    count: int = 0
    examples: list[tuple[TextLocation, str]] = field(default_factory=list)
    """First `EXAMPLES` locations in order, each with the evidence."""

    def add_examples(self, count: int, examples: list[tuple[TextLocation, str]]) -> None:
        """Add `count` documents that break the rule, and the known examples of them."""
        self.count += count
        # Sorting makes the examples independent of the order in which findings are added up.
        self.examples = sorted([*self.examples, *examples])[:EXAMPLES]


MAX_ASPECT_RATIO = 3.0
"""Ratio of sides above which an image is extreme: a square crop shows less than a third of it."""


@dataclass
class ImageFigures:
    """Statistics of the images of one domain and language."""

    images: int = 0
    bytes: int = 0
    sides: Counter[int] = field(default_factory=Counter)
    """Images by `histogram_bin` of the shorter side in pixels."""
    aspect_ratios: Counter[float] = field(default_factory=Counter)
    """Images by log2 of width / height, rounded to one decimal place."""
    extreme: int = 0
    classes: Counter[str] = field(default_factory=Counter)
    """Images, or objects, of each class."""
    objects: Counter[int] = field(default_factory=Counter)
    """Images by `histogram_bin` of their number of objects."""

    def add_image(self, size: int, width: int, height: int) -> None:
        """Add an image by the bytes of its file, and its width and height in pixels."""
        self.images += 1
        self.bytes += size
        self.sides[histogram_bin(min(width, height))] += 1
        # Adding 0.0 turns -0.0 into 0.0. In JSON the two would be different keys.
        self.aspect_ratios[round(math.log2(width / height), 1) + 0.0] += 1
        self.extreme += max(width, height) > MAX_ASPECT_RATIO * min(width, height)

    def add_annotation(self, annotation: Annotation) -> None:
        """Count the class of one image, or its objects and their classes."""
        if annotation.class_name is not None:
            self.classes[annotation.class_name] += 1
        else:
            self.objects[histogram_bin(len(annotation.instances))] += 1
            self.classes.update(instance.class_name for instance in annotation.instances)

    def __iadd__(self, addend: "ImageFigures") -> "ImageFigures":
        for count in fields(self):
            setattr(self, count.name, getattr(self, count.name) + getattr(addend, count.name))
        return self


@dataclass
class Figures:
    """Statistics of the documents of one domain and language."""

    documents: int = 0
    bytes: int = 0
    """Bytes of the texts in UTF-8."""
    characters: int = 0
    words: int = 0
    """Words as Gopher (arXiv 2112.11446) counts them: runs of characters without white space."""
    unspaced: int = 0
    """Characters in scripts without spaces between words."""
    held_out: int = 0
    """Documents that are held out for validation."""
    tokens: int = 0
    """Tokens of the texts without start tokens; 0 without a tokenizer."""
    unknown: int = 0
    """Tokens that are the tokenizer's unknown token."""
    lengths: Counter[int] = field(default_factory=Counter)
    """Documents by `histogram_bin` of their characters."""
    token_lengths: Counter[int] = field(default_factory=Counter)
    """Documents by `histogram_bin` of their tokens."""
    longest: int = 0
    """Characters of the longest document."""
    longest_at: TextLocation | None = None
    images: ImageFigures = field(default_factory=ImageFigures)
    """An image without text counts only here and in `documents` and `held_out`."""

    def add_document(
        self, text: str, size: int, words: int, tokens: int | None, held_out: bool, location: TextLocation
    ) -> None:
        """Add a document with a text of `size` bytes in UTF-8; `tokens` is None without a tokenizer.

        The caller counts unknown tokens.
        """
        characters = len(text)
        self.documents += 1
        self.bytes += size
        self.characters += characters
        self.words += words
        # An ASCII text has no characters of scripts without spaces between words, and `isascii` is much faster than the
        # search for them.
        self.unspaced += 0 if text.isascii() else sum(map(len, _UNSPACED_SCRIPTS.findall(text)))
        self.held_out += held_out
        self.lengths[histogram_bin(characters)] += 1
        if tokens is not None:
            self.tokens += tokens
            self.token_lengths[histogram_bin(tokens)] += 1
        self._update_longest(characters, location)

    def __iadd__(self, addend: "Figures") -> "Figures":
        for name in ("documents", "bytes", "characters", "words", "unspaced", "held_out", "tokens", "unknown"):
            setattr(self, name, getattr(self, name) + getattr(addend, name))
        self.lengths += addend.lengths
        self.images += addend.images
        self.token_lengths += addend.token_lengths
        if addend.longest_at:
            self._update_longest(addend.longest, addend.longest_at)
        return self

    def _update_longest(self, characters: int, location: TextLocation) -> None:
        """Update the longest document; of equals, keep the first in the order of locations."""
        if self.longest_at is None or (-characters, location) < (-self.longest, self.longest_at):
            self.longest, self.longest_at = characters, location

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes of text per token; None without tokens."""
        return self.bytes / self.tokens if self.tokens else None

    @property
    def tokens_per_character(self) -> float | None:
        """Tokens per character; None without tokens."""
        return self.tokens / self.characters if self.tokens else None

    @property
    def tokens_per_word(self) -> float | None:
        """Fertility of the tokenizer; None without tokens, or if spaces do not separate the words."""
        is_spaced = self.unspaced < MAX_UNSPACED_SHARE * self.characters
        return self.tokens / self.words if self.tokens and is_spaced else None


@dataclass
class DomainSurvey:
    """Statistics and problems of some or all raw files of one domain."""

    files: int = 0
    stored_bytes: int = 0
    """Bytes of the files as stored, compressed or not."""
    damaged: int = 0
    quarantined: Counter[str] = field(default_factory=Counter)
    """Unreadable items by reason."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Documents that filters dropped, by rule."""
    languages: dict[str, Figures] = field(default_factory=dict)
    """Statistics by the language that a document's record names, or else its subfolder."""
    findings: dict[str, Finding] = field(default_factory=dict)
    """Findings by the rule of textrules.py, or by the reason for the quarantine."""

    def add_file(self, size: int, tally: Tally) -> None:
        """Add a file of `size` bytes that was read to its end."""
        self.files += 1
        self.stored_bytes += size
        self.damaged += tally.damaged
        self.quarantined.update({str(reason): n for reason, n in tally.bad.items()})
        self.dropped.update(tally.dropped)

    def __iadd__(self, addend: "DomainSurvey") -> "DomainSurvey":
        self.files += addend.files
        self.stored_bytes += addend.stored_bytes
        self.damaged += addend.damaged
        self.quarantined += addend.quarantined
        self.dropped += addend.dropped
        for language, figures in addend.languages.items():
            self.languages.setdefault(language, Figures())
            self.languages[language] += figures
        for rule, finding in addend.findings.items():
            self.findings.setdefault(rule, Finding()).add_examples(finding.count, finding.examples)
        return self

    @property
    def all_figures(self) -> Figures:
        """Statistics of all documents in all languages."""
        return sum_figures(self.languages.values())


def sum_figures(parts: Iterable[Figures]) -> Figures:
    """Return the sum of several statistics as a new object."""
    result = Figures()
    for part in parts:
        result += part
    return result
