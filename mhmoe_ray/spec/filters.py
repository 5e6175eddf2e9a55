"""Filters for documents of a RedPajama-V2 source: languages, buckets, rules on quality signals, and duplicates."""

import difflib
import math
import operator
import re
from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import AfterValidator, Field, model_validator

from mhmoe_ray.spec.base import Section
from mhmoe_ray.spec.hints import MIN_SIMILARITY

Bucket = Literal["head", "middle", "tail"]

# Names of RedPajama-V2's quality signals, spelled as they were published, including misspellings ("punctution").
_SIGNAL_NAMES = """
ccnet_bucket ccnet_language_score ccnet_length ccnet_nlines ccnet_original_length ccnet_original_nlines ccnet_perplexity
rps_doc_books_importance rps_doc_openwebtext_importance rps_doc_wikipedia_importance
rps_doc_books_importance_length_correction rps_doc_openwebtext_importance_length_correction
rps_doc_wikipedia_importance_length_correction rps_doc_ml_wikiref_score rps_doc_ml_palm_score rps_doc_ml_wikipedia_score
rps_doc_curly_bracket rps_doc_frac_all_caps_words rps_doc_frac_lines_end_with_ellipsis rps_doc_frac_no_alph_words
rps_doc_lorem_ipsum rps_doc_mean_word_length rps_doc_stop_word_fraction rps_doc_symbol_to_word_ratio
rps_doc_frac_unique_words rps_doc_unigram_entropy rps_doc_word_count rps_doc_num_sentences
rps_lines_ending_with_terminal_punctution_mark rps_lines_javascript_counts rps_lines_num_words
rps_lines_numerical_chars_fraction rps_lines_start_with_bulletpoint rps_lines_uppercase_letter_fraction
rps_doc_frac_chars_dupe_5grams rps_doc_frac_chars_dupe_6grams rps_doc_frac_chars_dupe_7grams
rps_doc_frac_chars_dupe_8grams rps_doc_frac_chars_dupe_9grams rps_doc_frac_chars_dupe_10grams
rps_doc_frac_chars_top_2gram rps_doc_frac_chars_top_3gram rps_doc_frac_chars_top_4gram
rps_doc_ldnoobw_words rps_doc_ut1_blacklist
"""
SIGNALS = frozenset(_SIGNAL_NAMES.split())
SIMILARITIES = (0.7, 0.8, 0.9, 1.0)
"""Similarities of documents for which RedPajama-V2 has MinHash signatures."""

_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
_RULE = re.compile(r"\s*(\w+)\s*(<=|>=|==|!=|<|>)\s*(\S+)\s*")


class SignalRule(NamedTuple):
    """Rule on a quality signal, such as `rps_doc_word_count >= 50`."""

    signal: str
    comparison: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse `signal op number`; a wrong form, an unknown signal or an infinite number is a ValueError."""
        match = _RULE.fullmatch(text)
        if match is None:
            raise ValueError("write a rule as `signal op number`, for example rps_doc_word_count >= 50")
        signal, comparison, bound = match.groups()
        if signal not in SIGNALS:
            similar_signals = difflib.get_close_matches(signal, sorted(SIGNALS), n=1, cutoff=MIN_SIMILARITY)
            raise ValueError(
                f"there is no signal {signal!r}"
                + (f"; did you mean {similar_signals[0]!r}?" if similar_signals else "")
            )
        if not math.isfinite(number := float(bound)):
            raise ValueError(f"the bound must be a finite number, not {bound}")
        return cls(signal, comparison, number)

    def holds(self, value: float | None) -> bool:
        """Return whether a document with this value of the signal is kept; without a value (None) it is not."""
        return value is not None and _COMPARISONS[self.comparison](value, self.bound)

    def __str__(self) -> str:
        # Prepared folders record rules as text, with a short form of the bound. If its six digits are too few, all are
        # written.
        short = f"{self.bound:g}"
        return f"{self.signal} {self.comparison} {short if float(short) == self.bound else self.bound}"


def _normalize_rule(rule: str) -> str:
    return str(SignalRule.parse(rule))


class FilterSpec(Section):
    """Filters for documents of a RedPajama-V2 source.

    A document that does not pass is not used, and is counted under the first rule that it breaks. It is not quarantined
    as unreadable data is.
    """

    languages: list[str] | None = Field(default=None, min_length=1)
    """Languages to keep; by default all."""
    buckets: list[Bucket] = Field(default=["head", "middle"], min_length=1)
    """Buckets to keep: CCNet's thirds by perplexity. The tail has neither quality signals nor tables of duplicates."""
    gopher: bool = False
    """If true, Gopher's rules of quality and repetition apply, as far as RedPajama-V2 has signals for them
    (`data/sources/redpajama_v2.py`)."""
    signals: list[Annotated[str, AfterValidator(_normalize_rule)]] = Field(default=[])
    """Rules `signal op number` that a document must satisfy, such as `ccnet_perplexity < 500`. A signal with a value
    for each line (`rps_lines_...`) is averaged over the lines."""
    deduplicate: bool = False
    """If true, documents that are listed in RedPajama-V2's tables of duplicates are left out. They are exact copies of
    another document of the whole data set."""
    near_duplicates: float | None = None
    """Similarity from which on two documents are near duplicates, judged by their MinHash signatures; by default near
    duplicates are kept. A document is left out if it shares a band of its signature for this similarity with an earlier
    document of the same file that was kept. Near duplicates in other files stay."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.near_duplicates not in (None, *SIMILARITIES):
            raise ValueError(f"near_duplicates must be one of {', '.join(map(str, SIMILARITIES))}")
        if "tail" in self.buckets:
            for name in ("gopher", "signals", "deduplicate", "near_duplicates"):
                if getattr(self, name):
                    raise ValueError(f"the tail has no data that {name} needs: take tail out of buckets")
        return self
