"""Tests of tiktoken in place of the tokenizers library.

tiktoken gives the same tokens for every text, or it is not used.
"""

import base64
import json
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from mhmoe_ray.data.tokenizer.encoder import (
    MAX_SPACE_RUN,
    DocumentEncoder,
    _newest_letters_agree,
    _without_special_tokens,
    can_encode,
    fast_encoding,
)
from mhmoe_ray.data.tokenizer.tiktoken import BYTE_OF_LETTER, PATTERNS, from_tiktoken
from mhmoe_ray.data.tokenizer.train import train_bpe, train_unigram
from tests.data.tokenizer.texts import SCRIPTS, any_text
from tests.support.llama_tokenizer import llama_tokenizer

pytestmark = pytest.mark.long

CODE = Path(__file__).read_text()
TRAINED = train_bpe([*SCRIPTS, CODE] * 2, 1200)
LETTER_OF_BYTE = {byte: letter for letter, byte in BYTE_OF_LETTER.items()}


def make_fast_encoding(tokenizer):
    """Return the tiktoken encoding that replaces a tokenizer, or None if it is not certain that they agree."""
    return fast_encoding(_without_special_tokens(tokenizer))


def spell_token(token: str) -> str:
    """Return a token as a byte-level vocabulary spells it: one letter for each of its UTF-8 bytes."""
    return "".join(LETTER_OF_BYTE[byte] for byte in token.encode())


def make_tokenizer(tokens, merges, ignore_merges=False):
    """Return a byte-level BPE tokenizer with the given tokens after the bytes, and with the given merges."""
    vocab = {letter: byte for byte, letter in LETTER_OF_BYTE.items()}
    for token in tokens:
        vocab.setdefault(spell_token(token), len(vocab))
    spelled_merges = [(spell_token(a), spell_token(b)) for a, b in merges]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=spelled_merges, ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


@settings(max_examples=300)
@given(text=any_text.filter(lambda text: "<|endoftext|>" not in text))
def test_fast_encoding_equals_the_library_for_a_trained_tokenizer(text):
    assert ENCODING.encode_ordinary(text) == TRAINED.encode(text).ids


ENCODING = make_fast_encoding(TRAINED)


@settings(max_examples=60)
@given(
    corpus=st.lists(st.text("abc", min_size=1, max_size=30), min_size=1, max_size=8),
    size=st.integers(257, 320),
    words=st.lists(st.text("abcd", min_size=1, max_size=60), min_size=1, max_size=8),
)
def test_fast_encoding_accepts_trained_tokenizers(corpus, size, words):
    trained_tokenizer = train_bpe(corpus, size)
    for word in words:
        assert make_fast_encoding(trained_tokenizer).encode_ordinary(word) == trained_tokenizer.encode(word).ids


@settings(max_examples=600)
@given(data=st.data())
def test_fast_encoding_of_random_merges_is_equal_or_rejected(data):
    tokens = data.draw(st.lists(st.text("ab", min_size=2, max_size=6), unique=True, min_size=1, max_size=14))
    known_tokens = {"a", "b", *tokens}
    possible_merges = [(t[:i], t[i:]) for t in tokens for i in range(1, len(t)) if {t[:i], t[i:]} <= known_tokens]
    drawn_merges = [merge for merge in possible_merges if data.draw(st.integers(0, 3))]
    tokenizer = make_tokenizer(tokens, drawn_merges, ignore_merges=data.draw(st.booleans()))
    encoding = make_fast_encoding(tokenizer)
    for word in data.draw(st.lists(st.text("ab", min_size=1, max_size=40), min_size=1, max_size=5)):
        assert encoding is None or encoding.encode_ordinary(word) == tokenizer.encode(word).ids


@pytest.mark.parametrize(
    ("tokens", "merges", "ignore_merges", "is_accepted"),
    [
        (["ab", "abc"], [("a", "b"), ("ab", "c")], False, True),
        # No merge makes abc of ab and c, but no text needs it, because b and c are merged first.
        (["bc", "ab", "abc"], [("b", "c"), ("a", "b"), ("a", "bc")], False, True),
        # The bytes of abc are merged to ab and c, and these two are not merged, so no merging gives the token abc.
        (["ab", "bc", "abc"], [("a", "b"), ("b", "c"), ("a", "bc")], False, False),
        (["ab", "bc", "abc"], [("a", "b"), ("b", "c"), ("a", "bc")], True, False),
        # As a whole word, abc is looked up. In a longer word it is merged from ab and c, so both ways give the token.
        (["ab", "bc", "abc"], [("a", "b"), ("b", "c"), ("a", "bc"), ("ab", "c")], True, True),
        # No merge makes the token ab.
        (["ab"], [], False, False),
        # The order of the merges differs from that of their tokens.
        (["ab", "cd"], [("c", "d"), ("a", "b")], False, False),
        # The token abc has a lower id than its parts. In the first case it has all merges; in the second case one is
        # missing.
        (["abc", "ab", "bc"], [("a", "bc"), ("ab", "c"), ("a", "b"), ("b", "c")], False, True),
        (["abc", "ab", "bc"], [("ab", "c"), ("a", "b"), ("b", "c")], False, False),
    ],
)
def test_fast_encoding_accepts_equivalent_vocabularies_only(tokens, merges, ignore_merges, is_accepted):
    assert (make_fast_encoding(make_tokenizer(tokens, merges, ignore_merges)) is not None) is is_accepted


def make_byte_pair_tokenizer(pattern: str) -> Tokenizer:
    """Return a tokenizer with a token for each pair of bytes, so that every split of a text changes its tokens.

    Pairs of an ASCII and another byte have the lowest ranks after the single bytes.
    """
    byte_pairs = [bytes([a, b]) for a in range(256) for b in range(256)]
    byte_pairs.sort(key=lambda pair: (pair[0] < 128) == (pair[1] < 128))
    tokens = [*(bytes([byte]) for byte in range(256)), *byte_pairs]
    lines = b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    return from_tiktoken(lines, pattern, "pairs")


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("step", [41, pytest.param(1, marks=pytest.mark.slow)])
def test_fast_encoding_splits_every_character_like_the_library(name, step):
    """tiktoken and the library split alike around every character, although each has its own Unicode tables.

    With step 41, only every 41st character from U+3000 on is tested.
    """
    tokenizer = make_byte_pair_tokenizer(name)
    encoding = make_fast_encoding(tokenizer)
    codes = [c for c in [*range(0x3000), *range(0x3000, 0x110000, step)] if not 0xD800 <= c < 0xE000]
    for start in range(0, len(codes), 1024):
        surrounded_characters = [
            f"a{c}b {c} 1{c}2'{c}s\n{c}.{c}A{c}{c}\t{c}" for c in map(chr, codes[start : start + 1024])
        ]
        expected_encodings = tokenizer.encode_batch_fast(surrounded_characters, add_special_tokens=False)
        assert [e.ids for e in expected_encodings] == [encoding.encode_ordinary(text) for text in surrounded_characters]


def test_newest_letters_agree_detects_other_unicode_tables():
    assert all(map(_newest_letters_agree, PATTERNS.values()))
    # For [[:alpha:]], one engine takes all letters of Unicode and the other takes only those of ASCII.
    assert not _newest_letters_agree(r"[[:alpha:]]+|[^a]+")


def change_tokenizer(tokenizer, **attributes) -> Tokenizer:
    changed_tokenizer = Tokenizer.from_str(tokenizer.to_str())
    for name, value in attributes.items():
        setattr(changed_tokenizer, name, value)
    return changed_tokenizer


def add_token(token) -> Tokenizer:
    changed_tokenizer = Tokenizer.from_str(TRAINED.to_str())
    changed_tokenizer.add_tokens([token])
    return changed_tokenizer


def make_pre_tokenizer(pattern, **options) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(pattern, **{"behavior": "isolated", **options})
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def add_merge_of_other_letters() -> Tokenizer:
    content = json.loads(TRAINED.to_str())
    content["model"]["vocab"] |= {"月": 1200, "a月": 1201}
    content["model"]["merges"].append(["a", "月"])
    return Tokenizer.from_str(json.dumps(content))


CL100K = Regex(PATTERNS["cl100k"])
REJECTED_TOKENIZERS = {
    "unigram": train_unigram([*SCRIPTS, CODE], 400),
    "llama": llama_tokenizer([*SCRIPTS, CODE], 600),
    "normalizer": change_tokenizer(TRAINED, normalizer=normalizers.NFC()),
    "added token": add_token("moon rises"),
    "prefix space": change_tokenizer(TRAINED, pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "not split": change_tokenizer(
        TRAINED, pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ),
    "no bytes": change_tokenizer(TRAINED, pre_tokenizer=pre_tokenizers.Whitespace()),
    "nothing": change_tokenizer(TRAINED, pre_tokenizer=None),
    "own pattern": change_tokenizer(TRAINED, pre_tokenizer=make_pre_tokenizer(Regex(r"\d|\D+"))),
    "no pattern": change_tokenizer(TRAINED, pre_tokenizer=make_pre_tokenizer(PATTERNS["cl100k"])),
    "joined": change_tokenizer(TRAINED, pre_tokenizer=make_pre_tokenizer(CL100K, behavior="merged_with_next")),
    "inverted": change_tokenizer(TRAINED, pre_tokenizer=make_pre_tokenizer(CL100K, invert=True)),
    "dropout": change_tokenizer(TRAINED, model=models.BPE(vocab={"a": 0}, merges=[], dropout=0.5)),
    "two splits": change_tokenizer(
        TRAINED, pre_tokenizer=pre_tokenizers.Sequence([make_pre_tokenizer(CL100K), pre_tokenizers.Digits()])
    ),
    "other letters": add_merge_of_other_letters(),
    "no splits": change_tokenizer(TRAINED, pre_tokenizer=pre_tokenizers.Sequence([])),
    "a few bytes": change_tokenizer(TRAINED, model=models.BPE(vocab={"a": 0}, merges=[])),
}


@pytest.mark.parametrize("name", REJECTED_TOKENIZERS)
def test_fast_encoding_rejects_other_tokenizers(name):
    assert make_fast_encoding(REJECTED_TOKENIZERS[name]) is None


def test_fast_encoding_accepts_the_split_of_llama_3():
    """tiktoken is used for a tokenizer that splits text as the tokenizer.json of Llama 3 does."""
    assert make_fast_encoding(change_tokenizer(TRAINED, pre_tokenizer=make_pre_tokenizer(CL100K))) is not None


@given(
    prefix_length=st.integers(0, 2 * MAX_SPACE_RUN),
    run_length=st.integers(1, 3 * MAX_SPACE_RUN),
    suffix_length=st.integers(0, 9_000),
)
def test_can_encode_rejects_long_white_space(prefix_length, run_length, suffix_length):
    text = "x" * prefix_length + "\u3000" * run_length + "x" * suffix_length
    assert can_encode(text) or run_length >= MAX_SPACE_RUN
    assert not can_encode(text) or run_length < 2 * MAX_SPACE_RUN


@pytest.mark.parametrize("space", [" ", "\n", " \t", "\u2028", "\u3000"])
def test_encoder_uses_the_library_for_long_white_space(space):
    text = "so far" + space * 200_000 + "away"
    short_run_text = "so far" + space * ((2 * MAX_SPACE_RUN - 1) // len(space)) + "away"
    encoder = DocumentEncoder(TRAINED)
    assert [ids[1:] for ids in encoder.encode([short_run_text, text])] == [
        TRAINED.encode(t).ids for t in (short_run_text, text)
    ]
    [ids] = encoder.encode([short_run_text])
    assert ids[1:] == TRAINED.encode(short_run_text).ids
