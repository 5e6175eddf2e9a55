"""tiktoken in place of the tokenizers library: it gives the same tokens for every text, or it is not used."""

import base64
import json
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from mhmoe_ray.data.tokenizer.encoder import (
    LONGEST_SPACE,
    DocumentEncoder,
    _newest_letters_agree,
    _of_text_alone,
    can_encode,
    fast_encoding,
)
from mhmoe_ray.data.tokenizer.tiktoken import BYTE_OF_LETTER, PATTERNS, from_tiktoken
from mhmoe_ray.data.tokenizer.train import train_bpe, train_unigram
from tests.data.tokenizer.texts import SCRIPTS, texts
from tests.llama_tokenizer import llama_tokenizer

pytestmark = pytest.mark.long

CODE = Path(__file__).read_text()
TRAINED = train_bpe([*SCRIPTS, CODE] * 2, 1200)
LETTER_OF_BYTE = {byte: letter for letter, byte in BYTE_OF_LETTER.items()}


def fast(tokenizer):
    return fast_encoding(_of_text_alone(tokenizer))


def spelled(token: str) -> str:
    return "".join(LETTER_OF_BYTE[byte] for byte in token.encode())


def made(tokens, merges, ignore_merges=False):
    """Return a byte-level BPE tokenizer with these tokens after the bytes, and merges in the order given."""
    vocab = {letter: byte for byte, letter in LETTER_OF_BYTE.items()}
    for token in tokens:
        vocab.setdefault(spelled(token), len(vocab))
    pairs = [(spelled(a), spelled(b)) for a, b in merges]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


@settings(max_examples=300)
@given(text=texts.filter(lambda text: "<|endoftext|>" not in text))
def test_any_text_of_a_trained_tokenizer(text):
    assert ENCODING.encode_ordinary(text) == TRAINED.encode(text).ids


ENCODING = fast(TRAINED)


@settings(max_examples=60)
@given(
    corpus=st.lists(st.text("abc", min_size=1, max_size=30), min_size=1, max_size=8),
    size=st.integers(257, 320),
    words=st.lists(st.text("abcd", min_size=1, max_size=60), min_size=1, max_size=8),
)
def test_what_training_makes_is_taken(corpus, size, words):
    trained = train_bpe(corpus, size)
    for word in words:
        assert fast(trained).encode_ordinary(word) == trained.encode(word).ids


@settings(max_examples=600)
@given(data=st.data())
def test_what_no_training_made_is_the_same_or_not_taken(data):
    tokens = data.draw(st.lists(st.text("ab", min_size=2, max_size=6), unique=True, min_size=1, max_size=14))
    known = {"a", "b", *tokens}
    ways = [(t[:i], t[i:]) for t in tokens for i in range(1, len(t)) if {t[:i], t[i:]} <= known]
    kept = [way for way in ways if data.draw(st.integers(0, 3))]
    tokenizer = made(tokens, kept, ignore_merges=data.draw(st.booleans()))
    encoding = fast(tokenizer)
    for word in data.draw(st.lists(st.text("ab", min_size=1, max_size=40), min_size=1, max_size=5)):
        assert encoding is None or encoding.encode_ordinary(word) == tokenizer.encode(word).ids


@pytest.mark.parametrize(
    ("tokens", "merges", "ignore_merges", "taken"),
    [
        (["ab", "abc"], [("a", "b"), ("ab", "c")], False, True),
        # Another way to make abc, which no text ever shows.
        (["bc", "ab", "abc"], [("b", "c"), ("a", "b"), ("a", "bc")], False, True),
        # abc does not come out of its own bytes: they are ab and c first.
        (["ab", "bc", "abc"], [("a", "b"), ("b", "c"), ("a", "bc")], False, False),
        (["ab", "bc", "abc"], [("a", "b"), ("b", "c"), ("a", "bc")], True, False),
        # It is looked up as a whole, and made of ab and c too.
        (["ab", "bc", "abc"], [("a", "b"), ("b", "c"), ("a", "bc"), ("ab", "c")], True, True),
        # Nothing makes it.
        (["ab"], [], False, False),
        # A merge that comes before its token's turn.
        (["ab", "cd"], [("c", "d"), ("a", "b")], False, False),
        # A token of later ones, with each way to make it, and without one.
        (["abc", "ab", "bc"], [("a", "bc"), ("ab", "c"), ("a", "b"), ("b", "c")], False, True),
        (["abc", "ab", "bc"], [("ab", "c"), ("a", "b"), ("b", "c")], False, False),
    ],
)
def test_which_vocabularies_are_taken(tokens, merges, ignore_merges, taken):
    assert (fast(made(tokens, merges, ignore_merges)) is not None) is taken


def pairs_of_bytes(pattern: str) -> Tokenizer:
    """Return a tokenizer of all tokens of two bytes, so that any split of a text shows in its tokens.

    The tokens of an ASCII letter and another byte come first.
    """
    pairs = [bytes([a, b]) for a in range(256) for b in range(256)]
    pairs.sort(key=lambda pair: (pair[0] < 128) == (pair[1] < 128))
    tokens = [*(bytes([byte]) for byte in range(256)), *pairs]
    lines = b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    return from_tiktoken(lines, pattern, "pairs")


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("step", [41, pytest.param(1, marks=pytest.mark.slow)])
def test_every_character_is_of_the_same_kind_to_both(name, step):
    """Two engines read the pattern, each with its own Unicode tables."""
    library = pairs_of_bytes(name)
    encoding = fast(library)
    codes = [c for c in [*range(0x3000), *range(0x3000, 0x110000, step)] if not 0xD800 <= c < 0xE000]
    for start in range(0, len(codes), 1024):
        around = [f"a{c}b {c} 1{c}2'{c}s\n{c}.{c}A{c}{c}\t{c}" for c in map(chr, codes[start : start + 1024])]
        encoded = library.encode_batch_fast(around, add_special_tokens=False)
        assert [e.ids for e in encoded] == [encoding.encode_ordinary(text) for text in around]


def test_engines_that_do_not_know_the_same_letters_are_found_out():
    assert all(map(_newest_letters_agree, PATTERNS.values()))
    # Of Unicode to one engine, of ASCII to the other.
    assert not _newest_letters_agree(r"[[:alpha:]]+|[^a]+")


def with_(tokenizer, **attributes) -> Tokenizer:
    changed = Tokenizer.from_str(tokenizer.to_str())
    for name, value in attributes.items():
        setattr(changed, name, value)
    return changed


def with_added(token) -> Tokenizer:
    changed = Tokenizer.from_str(TRAINED.to_str())
    changed.add_tokens([token])
    return changed


def split_by(pattern, **options) -> pre_tokenizers.PreTokenizer:
    first = pre_tokenizers.Split(pattern, **{"behavior": "isolated", **options})
    return pre_tokenizers.Sequence([first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def with_a_merge_of_other_letters() -> Tokenizer:
    content = json.loads(TRAINED.to_str())
    content["model"]["vocab"] |= {"月": 1200, "a月": 1201}
    content["model"]["merges"].append(["a", "月"])
    return Tokenizer.from_str(json.dumps(content))


CL100K = Regex(PATTERNS["cl100k"])
NOT_TAKEN = {
    "unigram": train_unigram([*SCRIPTS, CODE], 400),
    "llama": llama_tokenizer([*SCRIPTS, CODE], 600),
    "normalizer": with_(TRAINED, normalizer=normalizers.NFC()),
    "added token": with_added("moon rises"),
    "prefix space": with_(TRAINED, pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "not split": with_(TRAINED, pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
    "no bytes": with_(TRAINED, pre_tokenizer=pre_tokenizers.Whitespace()),
    "nothing": with_(TRAINED, pre_tokenizer=None),
    "own pattern": with_(TRAINED, pre_tokenizer=split_by(Regex(r"\d|\D+"))),
    "no pattern": with_(TRAINED, pre_tokenizer=split_by(PATTERNS["cl100k"])),
    "joined": with_(TRAINED, pre_tokenizer=split_by(CL100K, behavior="merged_with_next")),
    "inverted": with_(TRAINED, pre_tokenizer=split_by(CL100K, invert=True)),
    "dropout": with_(TRAINED, model=models.BPE(vocab={"a": 0}, merges=[], dropout=0.5)),
    "two splits": with_(TRAINED, pre_tokenizer=pre_tokenizers.Sequence([split_by(CL100K), pre_tokenizers.Digits()])),
    "other letters": with_a_merge_of_other_letters(),
    "no splits": with_(TRAINED, pre_tokenizer=pre_tokenizers.Sequence([])),
    "a few bytes": with_(TRAINED, model=models.BPE(vocab={"a": 0}, merges=[])),
}


@pytest.mark.parametrize("name", NOT_TAKEN)
def test_other_tokenizers_are_not_taken(name):
    assert fast(NOT_TAKEN[name]) is None


def test_a_published_tokenizers_split_is_taken():
    """The split is the one of Llama 3's tokenizer.json."""
    assert fast(with_(TRAINED, pre_tokenizer=split_by(CL100K))) is not None


@given(before=st.integers(0, 2 * LONGEST_SPACE), run=st.integers(1, 3 * LONGEST_SPACE), after=st.integers(0, 9_000))
def test_long_white_space_is_seen(before, run, after):
    text = "x" * before + "\u3000" * run + "x" * after
    assert can_encode(text) or run >= LONGEST_SPACE
    assert not can_encode(text) or run < 2 * LONGEST_SPACE


@pytest.mark.parametrize("space", [" ", "\n", " \t", "\u2028", "\u3000"])
def test_text_that_would_break_tiktoken_is_encoded_by_the_library(space):
    text = "so far" + space * 200_000 + "away"
    near = "so far" + space * ((2 * LONGEST_SPACE - 1) // len(space)) + "away"
    encoder = DocumentEncoder(TRAINED)
    assert [ids[1:] for ids in encoder.encode([near, text])] == [TRAINED.encode(t).ids for t in (near, text)]
    [ids] = encoder.encode([near])
    assert ids[1:] == TRAINED.encode(near).ids
