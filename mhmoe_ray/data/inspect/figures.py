"""Figures of documents, which add up in any order and grouping, so that no split of the work shows in them.

Lengths are in histograms of 16 bins an octave.

Lengths up to 32 have bins of their own; above, a bin is at most a sixteenth of its length wide. So counts by octave are
exact, and a quantile is at most a sixteenth below the true one.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from mhmoe_ray.data.sources import Tally

STEPS = 4  # halvings of an octave


def bin_of(length: int) -> int:
    """The smallest length of its bin."""
    shift = max(0, length.bit_length() - 1 - STEPS)
    return length >> shift << shift


def quantile(bins: Mapping[int, int], share: float) -> int:
    """The smallest bin that has, with those below it, at least this share of all; 0 if there is none."""
    wanted, seen = share * sum(bins.values()), 0
    for lowest in sorted(bins):
        seen += bins[lowest]
        if seen >= wanted:
            return lowest
    return 0


def octaves(bins: Mapping[int, int]) -> dict[int, int]:
    """Counts by the power of two that a length is at least; 0 has its own. Without gaps, ascending."""
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
"""Kept of each finding."""
UNSPACED = 0.3
"""Share of a text's characters in scripts without spaces between words, from which on counting words says nothing."""
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
    """What one rule found in one domain."""

    count: int = 0
    examples: list[tuple[Place, str]] = field(default_factory=list)
    """The first ones by place, each with what was seen there."""

    def add(self, count: int, examples: list[tuple[Place, str]]) -> None:
        self.count += count
        self.examples = sorted([*self.examples, *examples])[:EXAMPLES]


@dataclass
class Figures:
    """Of documents of one domain and language."""

    documents: int = 0
    bytes: int = 0
    """Of their texts in UTF-8."""
    characters: int = 0
    words: int = 0
    """Runs of characters without white space: `str.split`, as Gopher counts them."""
    unspaced: int = 0
    """Characters of scripts that set no spaces between words."""
    held_out: int = 0
    """Documents that are kept for validation."""
    tokens: int = 0
    """Of their texts alone, without a start token; 0 where there is no tokenizer."""
    unknown: int = 0
    """Of those, the tokenizer's token for what it does not know."""
    lengths: Counter[int] = field(default_factory=Counter)
    """Of texts in characters, by `bin_of`."""
    token_lengths: Counter[int] = field(default_factory=Counter)
    longest: int = 0
    """Characters of the longest document."""
    longest_at: Place | None = None

    def count(self, text: str, size: int, words: int, tokens: int | None, held_out: bool, place: Place) -> None:
        """One more document.

        Args:
            text: of it.
            size: its bytes.
            words: it has.
            tokens: of the text; None without a tokenizer.
            held_out: whether it is kept for validation.
            place: where it begins.
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
        """Of documents of one length the first by place is kept."""
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
        """The usual fertility; None where words are not set apart by spaces."""
        spaced = self.unspaced < UNSPACED * self.characters
        return self.tokens / self.words if self.tokens and spaced else None


@dataclass
class DomainSurvey:
    files: int = 0
    stored_bytes: int = 0
    """As the files were listed."""
    damaged: int = 0
    """Files of which a part is lost."""
    quarantined: Counter[str] = field(default_factory=Counter)
    """By reason."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Left out by the source's filters, by rule."""
    languages: dict[str, Figures] = field(default_factory=dict)
    """As records name them, else as the subfolder does."""
    findings: dict[str, Finding] = field(default_factory=dict)
    """By rule of textrules.py, or by reason of quarantine."""

    def read(self, size: int, tally: Tally) -> None:
        """One file has been read."""
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
        """Of all its documents."""
        return total(self.languages.values())


def total(parts: Iterable[Figures]) -> Figures:
    result = Figures()
    for part in parts:
        result += part
    return result
