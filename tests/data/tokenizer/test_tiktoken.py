"""Tests of tokenizers of tiktoken's format against tiktoken itself."""

import base64
from pathlib import Path

import hypothesis.strategies as st
import pytest
import tiktoken
from hypothesis import given, settings
from tokenizers import pre_tokenizers

from mhmoe_ray.data.tokenizer.tiktoken import BYTE_OF_LETTER, LETTER_OF_BYTE, PATTERNS, from_tiktoken, is_tiktoken
from mhmoe_ray.data.tokenizer.train import train_bpe

from .texts import SCRIPTS, any_text

pytestmark = pytest.mark.long

CODE = Path(__file__).read_text()


def make_both_tokenizers(ranks, pattern):
    """Return a tokenizer of the tokenizers library and one of tiktoken with the same vocabulary."""
    lines = b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
    assert is_tiktoken(lines)
    reference = tiktoken.Encoding(
        "t", pat_str=PATTERNS.get(pattern, pattern), mergeable_ranks=ranks, special_tokens={"<|endoftext|>": len(ranks)}
    )
    return from_tiktoken(lines, pattern, "t"), reference


def trained_ranks():
    """Return the ranks of a trained BPE vocabulary: the bytes, then the merged tokens."""
    trained_tokenizer = train_bpe([*SCRIPTS, CODE] * 2, 1200)
    tokens = sorted((i, t) for t, i in trained_tokenizer.get_vocab().items() if i)
    return {bytes(BYTE_OF_LETTER[c] for c in token): i - 1 for i, token in tokens}


RANKS = trained_ranks()
TOKENIZER_PAIRS = {name: make_both_tokenizers(RANKS, name) for name in PATTERNS}


def test_letter_of_byte_equals_the_letters_of_the_library():
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    all_characters = "".join(chr(c) for c in [*range(0x0, 0xD800, 7), *range(0xE000, 0x110000, 997)])
    [(spelled_text, _)] = split.pre_tokenize_str(all_characters)
    assert spelled_text == all_characters.encode().decode("latin-1").translate(LETTER_OF_BYTE)
    assert {chr(letter) for letter in LETTER_OF_BYTE.values()} == set(pre_tokenizers.ByteLevel.alphabet())


@pytest.mark.parametrize("name", PATTERNS)
@settings(max_examples=300)
@given(text=any_text)
def test_from_tiktoken_encodes_any_text_like_tiktoken(name, text):
    tokenizer, reference = TOKENIZER_PAIRS[name]
    ids = tokenizer.encode(text).ids if "<|endoftext|>" not in text else None
    if ids is not None:
        assert ids == reference.encode_ordinary(text)
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", PATTERNS)
def test_from_tiktoken_encodes_code_and_scripts_like_tiktoken(name):
    tokenizer, reference = TOKENIZER_PAIRS[name]
    all_characters = "".join(chr(c) for c in [*range(0x3000), *range(0xA000, 0xD800, 3), *range(0xF900, 0x20000)])
    for text in [
        *SCRIPTS,
        CODE,
        all_characters,
        CODE.replace(" ", "\t \u3000"),
        "=" * 600 + " " * 300 + "\n" * 70 + "aA" * 90,
    ]:
        assert tokenizer.encode(text.replace("<|endoftext|>", "")).ids == reference.encode_ordinary(
            text.replace("<|endoftext|>", "")
        )


def test_from_tiktoken_adds_a_missing_end_of_text():
    tokenizer, reference = TOKENIZER_PAIRS["gpt2"]
    assert tokenizer.token_to_id("<|endoftext|>") == len(RANKS) == reference.eot_token
    tokenizer_with_end_of_text, _ = make_both_tokenizers(
        {**RANKS, b"<|endoftext|>": len(RANKS), b"q#q": len(RANKS) + 1}, "gpt2"
    )
    assert (tokenizer_with_end_of_text.token_to_id("<|endoftext|>"), tokenizer_with_end_of_text.get_vocab_size()) == (
        len(RANKS),
        len(RANKS) + 2,
    )


@settings(max_examples=150)
@given(
    tokens=st.lists(st.text("ab", min_size=2, max_size=7), unique=True, max_size=24),
    positions=st.permutations(range(256)).map(lambda token_order: token_order[:4]),
    words=st.lists(st.text("ab", min_size=1, max_size=40), min_size=1, max_size=4),
)
def test_from_tiktoken_merges_random_vocabularies_like_tiktoken(tokens, positions, words):
    """Both encode alike, although the tokens have random ranks, so that some of them never occur."""
    token_order = [bytes([b]) for b in range(256)]
    for position, token in zip([*positions, *range(0, 256, 11)], tokens, strict=False):
        token_order.insert(position, token.encode())
    tokenizer, reference = make_both_tokenizers(
        {token: rank for rank, token in enumerate(token_order)}, r"[ab]+|[^ab]+"
    )
    for text in words:
        assert tokenizer.encode(text).ids == reference.encode_ordinary(text)
