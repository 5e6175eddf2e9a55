"""Texts for tests of tokenizers: some in many scripts, and a strategy for any text."""

from pathlib import Path

import hypothesis.strategies as st

SCRIPTS = [
    "The moon rises over a quiet sea, and they'll sail; it's DON'T or don't, 12345 times.",
    "Straße, Österreich und Großvater fahren übers Meer.",
    "Луна восходит над тихим морем, и лодки идут домой.",
    "月が静かな海に昇り、小さな舟は帰る。カタカナも。",
    "달이 고요한 바다 위로 떠오른다.",
    "चाँद शांत समुद्र पर उगता है।",
    "يرتفع القمر فوق بحر هادئ ١٢٣",
    "Σελήνη ανατέλλει Ωκεανός ǅ ʰ",
    "🦊🧭👩‍👩‍👧‍👦 e\u0301 \u0130 \u017f K ﬆ",
    "def f(x):\n\n\treturn {'a': x ** 2}  # <s>, </s>\r\n",
]

_CHARACTERS = st.sampled_from(sorted({c for text in SCRIPTS for c in text}) + list(" \n\t\r'a1\u00a0\u3000\u0085"))
_SPECIAL_TEXTS = st.sampled_from(
    ["<|endoftext|>", "<s>", "</s>", "<unk>", "<0x41>", "▁", "Ġ", "'S", "'\u017f", "'LL", "\ufffd"]
)
any_text = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=60),
    st.lists(st.one_of(_CHARACTERS, _SPECIAL_TEXTS, st.sampled_from(SCRIPTS)), max_size=40).map("".join),
)
"""Strategy for any Unicode text without lone surrogates, which no document has."""


def training_corpus():
    """Return the first 12 source files of mhmoe_ray/data, and texts in many scripts."""
    return [path.read_text() for path in sorted(Path("mhmoe_ray/data").rglob("*.py"))][:12] + SCRIPTS
