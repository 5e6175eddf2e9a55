"""Figures (statistics) of documents: counts, and histograms of lengths.

Figures can be added up in any order and grouping, so the result is the same for any division of the work into tasks.

The histograms of lengths have 16 bins for each octave (the lengths from n to 2n - 1, for n a power of two). Each length
below 32 has a separate bin; from there on, the width of a bin is at most a sixteenth of the smallest length in it. So
counts by octave are exact, and a quantile is at most a sixteenth below the true one.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from mhmoe_ray.data.images.annotations import Annotation
from mhmoe_ray.data.sources import Tally

# An octave (the lengths from n to 2n) is halved four times, which gives 16 bins of a histogram.
OCTAVE_HALVINGS = 4


def histogram_bin(length: int) -> int:
    """Return the histogram bin of a length: the smallest length that falls into the same bin."""
    shift = max(0, length.bit_length() - 1 - OCTAVE_HALVINGS)
    return length >> shift << shift


def quantile(bins: Mapping[int, int], share: float) -> int:
    """Return a quantile of a histogram: the smallest bin up to which the bins hold `share` of all entries.

    Return 0 if there are no entries.

    Args:
        bins: number of entries by bin, as from `histogram_bin`.
        share: share of the entries, for example 0.5 for the median.
    """
    target_count, cumulative_count = share * sum(bins.values()), 0
    for bin_start in sorted(bins):
        cumulative_count += bins[bin_start]
        if cumulative_count >= target_count:
            return bin_start
    return 0


def octave_counts(bins: Mapping[int, int]) -> dict[int, int]:
    """Sum a histogram of lengths by octave, with the first length of each octave (0, 1, 2, 4, 8 ...) as its key.

    Octaves are in ascending order and without gaps: an empty one between others has count 0.

    Args:
        bins: number of entries by bin, as from `histogram_bin`.
    """
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
"""Number of example documents that are kept for each problem."""
MAX_UNSPACED_SHARE = 0.3
"""Smallest share of characters in scripts without spaces between words at which a count of words is meaningless."""
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
    """Location of a text in a raw file."""

    path: str
    line: int
    """Number of the text's line or row, or of its first line, from 1."""

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


@dataclass
class Finding:
    """Documents of one domain that break one rule: their number and some examples."""

    count: int = 0
    examples: list[tuple[TextLocation, str]] = field(default_factory=list)
    """First `EXAMPLES` examples in the order of locations, each with the evidence."""

    def add_examples(self, count: int, examples: list[tuple[TextLocation, str]]) -> None:
        """Add `count` documents that break the rule, and the examples of them that are known."""
        self.count += count
        # Sorting makes the examples independent of the order in which findings are added up.
        self.examples = sorted([*self.examples, *examples])[:EXAMPLES]


MAX_ASPECT_RATIO = 3.0
"""Ratio of the sides of an image above which it counts as extreme: a square crop then shows less than a third of it."""


@dataclass
class ImageFigures:
    """Statistics of the images of one domain and language."""

    images: int = 0
    bytes: int = 0
    """Bytes of the image files."""
    sides: Counter[int] = field(default_factory=Counter)
    """Histogram of the shorter sides in pixels: number of images by `histogram_bin`."""
    aspect_ratios: Counter[float] = field(default_factory=Counter)
    """Number of images by the logarithm to base 2 of the ratio of width to height, rounded to one decimal place."""
    extreme: int = 0
    """Number of images with one side more than `MAX_ASPECT_RATIO` times as long as the other."""
    classes: Counter[str] = field(default_factory=Counter)
    """Number of images of each class, or of objects of each class."""
    objects: Counter[int] = field(default_factory=Counter)
    """Histogram of the number of objects in an image, if the source has objects: number of images by
    `histogram_bin`."""

    def add_image(self, size: int, width: int, height: int) -> None:
        """Add one image: the bytes of its file, and its width and height in pixels."""
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
        self.images += addend.images
        self.bytes += addend.bytes
        self.sides += addend.sides
        self.aspect_ratios += addend.aspect_ratios
        self.extreme += addend.extreme
        self.classes += addend.classes
        self.objects += addend.objects
        return self


@dataclass
class Figures:
    """Statistics of the documents of one domain and language."""

    documents: int = 0
    bytes: int = 0
    """Bytes of the documents' texts in UTF-8."""
    characters: int = 0
    words: int = 0
    """Number of words as Gopher (arXiv 2112.11446) counts them: runs of characters without white space."""
    unspaced: int = 0
    """Number of characters in scripts without spaces between words."""
    held_out: int = 0
    """Number of documents that are held out for validation."""
    tokens: int = 0
    """Number of tokens of the texts alone, without start tokens; 0 without a tokenizer."""
    unknown: int = 0
    """Number of the tokens in `tokens` that are the tokenizer's unknown token."""
    lengths: Counter[int] = field(default_factory=Counter)
    """Histogram of text lengths in characters: number of documents by `histogram_bin`."""
    token_lengths: Counter[int] = field(default_factory=Counter)
    """Histogram of text lengths in tokens: number of documents by `histogram_bin`."""
    longest: int = 0
    """Length of the longest document in characters."""
    longest_at: TextLocation | None = None
    """Location of the longest document; None without documents."""
    images: ImageFigures = field(default_factory=ImageFigures)
    """Statistics of the images. A document that is an image without text counts only here and in `documents` and
    `held_out`."""

    def add_document(
        self, text: str, size: int, words: int, tokens: int | None, held_out: bool, location: TextLocation
    ) -> None:
        """Add one document with a text to the statistics; unknown tokens are counted by the caller.

        Args:
            text: the document's text.
            size: bytes of the text in UTF-8.
            words: number of words in the text.
            tokens: number of tokens of the text; None without a tokenizer.
            held_out: whether the document is held out for validation.
            location: the location of the document's beginning.
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
        """Update the longest document; of several with the same length, keep the first in the order of locations."""
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
        """Fertility of the tokenizer, tokens per word; None without tokens, or if spaces do not separate the words."""
        is_spaced = self.unspaced < MAX_UNSPACED_SHARE * self.characters
        return self.tokens / self.words if self.tokens and is_spaced else None


@dataclass
class DomainSurvey:
    """Survey of some or all raw files of one domain: statistics of their documents, and problems in them."""

    files: int = 0
    stored_bytes: int = 0
    """Bytes of the files as stored, compressed or not."""
    damaged: int = 0
    """Number of damaged files, which could not be read completely."""
    quarantined: Counter[str] = field(default_factory=Counter)
    """Number of items that could not be read, by reason."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Number of documents that the source's filters dropped, by rule."""
    languages: dict[str, Figures] = field(default_factory=dict)
    """Statistics of documents by language: the language that a document's record names, else that of the subfolder."""
    findings: dict[str, Finding] = field(default_factory=dict)
    """Findings by the rule of textrules.py that documents break, or by the reason why items are in quarantine."""

    def add_file(self, size: int, tally: Tally) -> None:
        """Add one file that was read to its end: its size in bytes, and the tally (the counts of its items)."""
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
        """Statistics of all documents of the domain, in all languages."""
        return sum_figures(self.languages.values())


def sum_figures(parts: Iterable[Figures]) -> Figures:
    """Return the sum of several statistics of documents as a new object."""
    result = Figures()
    for part in parts:
        result += part
    return result
