"""RedPajama-V2's quality signals, and the rules that keep or drop a document by them.

`gopher: true` means the rules of Rae et al. 2021 (arXiv 2112.11446, appendix A.1.1) for which there is a signal. Left
out are their duplicate lines and paragraphs, which V2 does not count. Stop words are V2's own for each language.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from mhmoe_ray.spec import FilterSpec, SignalRule

Signals = Mapping[str, list[list[Any]]]
"""By name: spans [start, end, score or null], one for a document, one a line for `rps_lines_...`."""

GOPHER = (
    "rps_doc_word_count >= 50",
    "rps_doc_word_count <= 100000",
    "rps_doc_mean_word_length >= 3",
    "rps_doc_mean_word_length <= 10",
    "rps_doc_symbol_to_word_ratio <= 0.1",
    "rps_lines_start_with_bulletpoint <= 0.9",
    "rps_doc_frac_lines_end_with_ellipsis <= 0.3",
    "rps_doc_frac_no_alph_words <= 0.2",
    "rps_doc_frac_chars_top_2gram <= 0.2",
    "rps_doc_frac_chars_top_3gram <= 0.18",
    "rps_doc_frac_chars_top_4gram <= 0.16",
    "rps_doc_frac_chars_dupe_5grams <= 0.15",
    "rps_doc_frac_chars_dupe_6grams <= 0.14",
    "rps_doc_frac_chars_dupe_7grams <= 0.13",
    "rps_doc_frac_chars_dupe_8grams <= 0.12",
    "rps_doc_frac_chars_dupe_9grams <= 0.11",
    "rps_doc_frac_chars_dupe_10grams <= 0.1",
)
STOP_WORDS = 2
"""At least as many in a document; V2 has their share of its words."""


class Rule(NamedTuple):
    name: str
    """As it is counted."""
    holds: Callable[[Signals], bool]
    """Raises KeyError for a record without its signal, TypeError or IndexError for one of another form."""


def rules_of(filters: FilterSpec) -> list[Rule]:
    """All rules by signal, in the order in which they are tried."""
    made = []
    if filters.gopher:
        made = [_rule(text, "gopher: ") for text in GOPHER]
        made.append(Rule(f"gopher: {STOP_WORDS} stop words", _has_stop_words))
    return made + [_rule(text) for text in filters.signals]


def _rule(text: str, prefix: str = "") -> Rule:
    parsed = SignalRule.parse(text)
    return Rule(f"{prefix}{parsed}", lambda signals: parsed.holds(value(signals, parsed.signal)))


def _has_stop_words(signals: Signals) -> bool:
    share, words = value(signals, "rps_doc_stop_word_fraction"), value(signals, "rps_doc_word_count")
    # Scores are rounded to eight digits.
    return share is not None and words is not None and share * words > STOP_WORDS - 0.5


def value(signals: Signals, name: str) -> float | None:
    """A document's score, or the mean over its lines; None where there is none."""
    scores = [score for _, _, score in signals[name] if score is not None]
    return sum(scores) / len(scores) if scores else None
