"""Tests of token widths: the widths of a text's tokens add up to the number of bytes of the text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mhmoe_ray.data.tokenizer import END_OF_TEXT, UNKNOWN_WIDTH, DocumentEncoder, token_widths
from mhmoe_ray.data.tokenizer.train import train_bpe, train_unigram
from tests.data.texts import make_documents
from tests.support.llama_tokenizer import llama_tokenizer

TEXTS = [*make_documents("en", 60), "über die Brücke → 東京 нет"]
TRAIN_FUNCTIONS = {"bpe": train_bpe, "unigram": train_unigram}
TOKENIZERS = {name: train([*TEXTS], 400) for name, train in TRAIN_FUNCTIONS.items()}


@pytest.mark.parametrize("kind", TRAIN_FUNCTIONS)
@given(text=st.text(max_size=60).map(lambda suffix: "the moon " + suffix))
def test_token_widths_add_up_to_the_bytes_of_a_document(kind, text):
    ids = DocumentEncoder(TOKENIZERS[kind]).encode([text])[0]
    widths = token_widths(TOKENIZERS[kind])
    assert widths[ids[0]] == 0  # the start token has no text
    assert widths[ids].sum() == len(text.encode())


@pytest.mark.parametrize("kind", TRAIN_FUNCTIONS)
def test_token_widths_of_added_tokens_are_their_bytes(kind):
    tokenizer = Tokenizer.from_str(TOKENIZERS[kind].to_str())
    tokenizer.add_tokens(["→", "東京"])
    text = "the → moon 東京"
    ids = DocumentEncoder(tokenizer).encode([text])[0]
    assert {tokenizer.token_to_id("→"), tokenizer.token_to_id("東京")} <= set(ids)
    assert token_widths(tokenizer)[ids].sum() == len(text.encode())


def test_token_widths_of_a_llama_tokenizer():
    tokenizer = llama_tokenizer(TEXTS, 400)
    text = "the moon 🌙 rises"
    ids = DocumentEncoder(tokenizer).encode([text])[0]
    assert token_widths(tokenizer)[ids].sum() == len(text.encode()) + 1


def test_token_widths_with_marked_pieces_and_without_a_decoder():
    words = [*sorted(set("".join(TEXTS))), "##e", "##s"]
    piece_tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    widths = token_widths(piece_tokenizer)
    assert widths[piece_tokenizer.token_to_id("##e")] == 1
    tokenizer_with_suffix = Tokenizer(models.BPE({"a": 0, "a</w>": 1}, [], end_of_word_suffix="</w>"))
    # This tokenizer has no tokens for letters other than a and drops them, so its widths would not add up.
    assert token_widths(tokenizer_with_suffix).tolist() == [UNKNOWN_WIDTH, UNKNOWN_WIDTH]
    tokenizer_without_decoder = Tokenizer.from_str(TOKENIZERS["bpe"].to_str())
    tokenizer_without_decoder.decoder = decoders.Fuse()
    assert (token_widths(tokenizer_without_decoder) == token_widths(TOKENIZERS["bpe"])).all()


def test_token_widths_are_unknown_if_spaces_are_lost():
    letters = sorted({*"".join(TEXTS), *map(chr, range(33, 127))})
    tokenizer = Tokenizer(models.WordPiece({t: i for i, t in enumerate([*letters, *(f"##{c}" for c in letters)])}))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    assert set(token_widths(tokenizer)) == {UNKNOWN_WIDTH}


@pytest.mark.parametrize(
    "model",
    [
        models.BPE({"<unk>": 0, "a": 1}, [], unk_token="<unk>"),
        models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0),
        models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"),
    ],
)
def test_token_width_of_the_unknown_token_is_unknown(model):
    assert token_widths(Tokenizer(model)).tolist() == [UNKNOWN_WIDTH, 1]


def test_tokenizer_with_byte_fallback_uses_no_unknown_token():
    tokenizer = llama_tokenizer(TEXTS, 400)
    ids = DocumentEncoder(tokenizer).encode(["ab 東京 🌙"])[0]
    assert UNKNOWN_WIDTH not in token_widths(tokenizer)[ids]


def test_token_width_of_end_of_text_is_zero():
    model = models.BPE({END_OF_TEXT: 0, "a": 1}, [], unk_token=END_OF_TEXT)
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens([END_OF_TEXT])
    assert token_widths(tokenizer).tolist() == [0, 1]
