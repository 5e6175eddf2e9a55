"""The tokenizers library against tiktoken itself."""

import base64
from pathlib import Path

import hypothesis.strategies as st
import pytest
import tiktoken
from hypothesis import given, settings
from tokenizers import pre_tokenizers

from mhmoe_ray.data.tokenizer.tiktoken import BYTE_OF_LETTER, LETTERS, PATTERNS, from_tiktoken, is_tiktoken
from mhmoe_ray.data.tokenizer.train import train_bpe

from .texts import SCRIPTS, texts

pytestmark = pytest.mark.long

CODE = Path(__file__).read_text()


def both(ranks, pattern):
    """Return a vocabulary as a tokenizer of the tokenizers library and as one of tiktoken."""
    lines = b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
    assert is_tiktoken(lines)
    theirs = tiktoken.Encoding(
        "t", pat_str=PATTERNS.get(pattern, pattern), mergeable_ranks=ranks, special_tokens={"<|endoftext|>": len(ranks)}
    )
    return from_tiktoken(lines, pattern, "t"), theirs


def trained_ranks():
    """Return ranks of the usual kind: bytes, then the tokens that BPE joined."""
    made = train_bpe([*SCRIPTS, CODE] * 2, 1200)
    tokens = sorted((i, t) for t, i in made.get_vocab().items() if i)
    return {bytes(BYTE_OF_LETTER[c] for c in token): i - 1 for i, token in tokens}


RANKS = trained_ranks()
PAIRS = {name: both(RANKS, name) for name in PATTERNS}


def test_bytes_are_written_with_the_librarys_letters():
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    every = "".join(chr(c) for c in [*range(0x0, 0xD800, 7), *range(0xE000, 0x110000, 997)])
    [(written, _)] = split.pre_tokenize_str(every)
    assert written == every.encode().decode("latin-1").translate(LETTERS)
    assert {chr(letter) for letter in LETTERS.values()} == set(pre_tokenizers.ByteLevel.alphabet())


@pytest.mark.parametrize("name", PATTERNS)
@settings(max_examples=300)
@given(text=texts)
def test_any_text_is_encoded_as_tiktoken_does(name, text):
    ours, theirs = PAIRS[name]
    ids = ours.encode(text).ids if "<|endoftext|>" not in text else None
    if ids is not None:
        assert ids == theirs.encode_ordinary(text)
        assert ours.decode(ids) == text


@pytest.mark.parametrize("name", PATTERNS)
def test_code_and_scripts_are_encoded_as_tiktoken_does(name):
    ours, theirs = PAIRS[name]
    every = "".join(chr(c) for c in [*range(0x3000), *range(0xA000, 0xD800, 3), *range(0xF900, 0x20000)])
    for text in [*SCRIPTS, CODE, every, CODE.replace(" ", "\t \u3000"), "=" * 600 + " " * 300 + "\n" * 70 + "aA" * 90]:
        assert ours.encode(text.replace("<|endoftext|>", "")).ids == theirs.encode_ordinary(
            text.replace("<|endoftext|>", "")
        )


def test_the_end_of_text_is_the_next_id_unless_it_is_there():
    ours, theirs = PAIRS["gpt2"]
    assert ours.token_to_id("<|endoftext|>") == len(RANKS) == theirs.eot_token
    there, _ = both({**RANKS, b"<|endoftext|>": len(RANKS), b"q#q": len(RANKS) + 1}, "gpt2")
    assert (there.token_to_id("<|endoftext|>"), there.get_vocab_size()) == (len(RANKS), len(RANKS) + 2)


@settings(max_examples=150)
@given(
    tokens=st.lists(st.text("ab", min_size=2, max_size=7), unique=True, max_size=24),
    first=st.permutations(range(256)).map(lambda order: order[:4]),
    words=st.lists(st.text("ab", min_size=1, max_size=40), min_size=1, max_size=4),
)
def test_vocabularies_that_no_training_made_are_joined_alike(tokens, first, words):
    """Ranks are in any order, so that some tokens cannot be reached, or only across others."""
    order = [bytes([b]) for b in range(256)]
    for at, token in zip([*first, *range(0, 256, 11)], tokens, strict=False):
        order.insert(at, token.encode())
    ours, theirs = both({token: rank for rank, token in enumerate(order)}, r"[ab]+|[^ab]+")
    for text in words:
        assert ours.encode(text).ids == theirs.encode_ordinary(text)
