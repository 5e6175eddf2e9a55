"""Tests that text never becomes a special token."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from mhmoe_ray.data.tokenizer import boundaries, document_encoder
from mhmoe_ray.data.tokenizer.encoder import DocumentEncoder
from mhmoe_ray.data.tokenizer.load import load_tokenizer, read_tokenizer
from mhmoe_ray.data.tokenizer.tiktoken import from_tiktoken
from mhmoe_ray.data.tokenizer.train import train_bpe, train_unigram
from tests.data.tokenizer.words import BYTES, make_word_tokenizer
from tests.support.llama_tokenizer import llama_tokenizer

TEXTS = ["the moon rises over a quiet sea <s> </s>", "<|endoftext|> is the end", "a boat & a wind"] * 3


def make_unigram_with_special_pieces():
    """Return a Unigram tokenizer like XLM-RoBERTa's: its special tokens are pieces, too, with the best scores."""
    letters = [(c, -5.0) for c in sorted({c for t in TEXTS for c in t} - {" "})]
    vocab = [("<s>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters]
    tokenizer = Tokenizer(models.Unigram(vocab, 2))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.add_special_tokens(["<s>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return tokenizer


def make_tiktoken_with_end_of_text():
    """Return a tokenizer of tiktoken's format whose pattern splits nothing and whose ranks include END_OF_TEXT."""
    lines = BYTES + b"PHw= 256\nPHxlbmRvZnRleHR8Pg== 257\n"  # in base64, <| and <|endoftext|>
    return from_tiktoken(lines, r"[\s\S]+", "ranks")


def make_word_tokenizer_with_added_tokens():
    tokenizer = make_word_tokenizer("<unk>", "<s>", "</s>", "a", "boat", "pad")
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece(prefix="##")
    tokenizer.add_special_tokens(["pad"])
    tokenizer.add_tokens(["& a"])
    return tokenizer


TOKENIZERS = {
    "bpe": train_bpe(TEXTS, 330),
    "unigram": train_unigram(TEXTS, 300),
    "llama": llama_tokenizer(TEXTS, 340),
    "pieces": make_unigram_with_special_pieces(),
    "ranks": make_tiktoken_with_end_of_text(),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("text", ["a <|endoftext|> b", "<s>", "</s><s> the end<|endoftext|>", "<|endoftext|>", "moon"])
def test_encoder_encodes_special_tokens_in_text_as_letters(kind, text):
    tokenizer = TOKENIZERS[kind]
    [ids] = DocumentEncoder(tokenizer).encode([text])
    document_boundaries = boundaries(tokenizer)
    special_ids = {
        i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special
    } | document_boundaries.ends
    assert ids[0] == document_boundaries.start
    # The tokenizer "pieces" has no "|" and encodes it as the unknown token, which is also a special token.
    assert special_ids.isdisjoint(ids[1:]) or (kind == "pieces" and "|" in text and not {0, 1} & set(ids[1:]))
    if kind != "pieces" or "|" not in text:
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert tokenizer.decode(ids[1:], skip_special_tokens=False) == text


@pytest.mark.parametrize("kind", ["bpe", "unigram", "llama"])
def test_encoder_encodes_other_text_like_the_library(kind):
    tokenizer = TOKENIZERS[kind]
    texts = ["the quiet boat & the wind", "日本 über\n\n  <moon> \x00\ufffd", ""]
    for text, ids in zip(texts, DocumentEncoder(tokenizer).encode(texts), strict=True):
        assert ids[1:] == tokenizer.encode(text, add_special_tokens=False).ids


def test_encoder_keeps_ids_of_added_tokens():
    tokenizer = make_word_tokenizer_with_added_tokens()
    [ids] = DocumentEncoder(tokenizer).encode(["a boat & a pad <s> gone"])
    assert ids == [1, 3, 4, tokenizer.token_to_id("& a"), 0, 0, 0]
    assert tokenizer.encode("a boat & a pad <s> gone").ids == [3, 4, tokenizer.token_to_id("& a"), 5, 1, 0]


def test_document_encoder_ignores_truncation_and_padding(tmp_path):
    tokenizer = train_bpe(TEXTS, 300)
    expected_ids = tokenizer.encode("the moon rises").ids
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / "t.json"))
    assert "truncation" in json.loads((tmp_path / "t.json").read_text())
    assert document_encoder(tmp_path / "t.json").encode(["the moon rises"]) == [[0, *expected_ids]]


def test_stored_padding_does_not_hide_the_start_token(tmp_path):
    """The post-processor adds a start token of another name than the token that ends documents."""
    tokenizer = train_bpe(TEXTS, 300)
    tokenizer.add_special_tokens(["<|begin|>"])
    begin = tokenizer.token_to_id("<|begin|>")
    tokenizer.post_processor = processors.TemplateProcessing("<|begin|> $A", special_tokens=[("<|begin|>", begin)])
    tokenizer.enable_padding(length=128)
    tokenizer.enable_truncation(20)
    file = tmp_path / "t.json"
    tokenizer.save(str(file))
    assert boundaries(read_tokenizer(file)).start == boundaries(load_tokenizer(file, 400)).start == begin
    [[first_token, *text_tokens]] = document_encoder(file).encode(["the moon rises"])
    assert first_token == begin
    assert 128 > len(text_tokens) > 0
