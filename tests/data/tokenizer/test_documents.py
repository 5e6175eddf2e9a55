"""Text never becomes a special token."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from mhmoe_ray.data.tokenizer import boundaries, document_encoder
from mhmoe_ray.data.tokenizer.encoder import DocumentEncoder
from mhmoe_ray.data.tokenizer.tiktoken import from_tiktoken
from mhmoe_ray.data.tokenizer.train import train_bpe, train_unigram
from tests.data.tokenizer.test_load import BYTES
from tests.data.tokenizer.words import words
from tests.llama_tokenizer import llama_tokenizer

TEXTS = ["the moon rises over a quiet sea <s> </s>", "<|endoftext|> is the end", "a boat & a wind"] * 3


def pieces_with_specials():
    """Return a Unigram tokenizer whose special tokens are among its pieces, at the best score, as in XLM-RoBERTa and
    T5."""
    letters = [(c, -5.0) for c in sorted({c for t in TEXTS for c in t} - {" "})]
    vocab = [("<s>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters]
    made = Tokenizer(models.Unigram(vocab, 2))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.add_special_tokens(["<s>", "</s>", "<unk>"])
    made.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return made


def ranks_with_end_of_text():
    """Return a tokenizer in tiktoken's format with a pattern that splits nothing and the end of text among the
    ranks."""
    lines = BYTES + b"PHw= 256\nPHxlbmRvZnRleHR8Pg== 257\n"  # <| and <|endoftext|>
    return from_tiktoken(lines, r"[\s\S]+", "ranks")


def lowered_after():
    made = words("<unk>", "<s>", "</s>", "a", "boat", "pad")
    made.pre_tokenizer, made.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece(prefix="##")
    made.add_special_tokens(["pad"])
    made.add_tokens(["& a"])
    return made


MADE = {
    "bpe": train_bpe(TEXTS, 330),
    "unigram": train_unigram(TEXTS, 300),
    "llama": llama_tokenizer(TEXTS, 340),
    "pieces": pieces_with_specials(),
    "ranks": ranks_with_end_of_text(),
}


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("text", ["a <|endoftext|> b", "<s>", "</s><s> the end<|endoftext|>", "<|endoftext|>", "moon"])
def test_special_tokens_in_text_are_letters(kind, text):
    made = MADE[kind]
    [ids] = DocumentEncoder(made).encode([text])
    edges = boundaries(made)
    special = {i for i, token in made.get_added_tokens_decoder().items() if token.special} | edges.ends
    assert ids[0] == edges.start
    # "pieces" does not know "|", which is unknown and not a special token that the text asked for.
    assert special.isdisjoint(ids[1:]) or (kind == "pieces" and "|" in text and not {0, 1} & set(ids[1:]))
    if kind != "pieces" or "|" not in text:
        assert made.decode(ids, skip_special_tokens=True) == text
        assert made.decode(ids[1:], skip_special_tokens=False) == text


@pytest.mark.parametrize("kind", ["bpe", "unigram", "llama"])
def test_other_text_is_encoded_as_the_library_does(kind):
    made = MADE[kind]
    texts = ["the quiet boat & the wind", "日本 über\n\n  <moon> \x00\ufffd", ""]
    for text, ids in zip(texts, DocumentEncoder(made).encode(texts), strict=True):
        assert ids[1:] == made.encode(text, add_special_tokens=False).ids


def test_added_tokens_keep_their_ids():
    made = lowered_after()
    [ids] = DocumentEncoder(made).encode(["a boat & a pad <s> gone"])
    assert ids == [1, 3, 4, made.token_to_id("& a"), 0, 0, 0]
    assert made.encode("a boat & a pad <s> gone").ids == [3, 4, made.token_to_id("& a"), 5, 1, 0]


def test_the_encoder_of_a_file_neither_cuts_nor_pads(tmp_path):
    made = train_bpe(TEXTS, 300)
    plain = made.encode("the moon rises").ids
    made.enable_truncation(2)
    made.enable_padding(length=50)
    made.save(str(tmp_path / "t.json"))
    assert "truncation" in json.loads((tmp_path / "t.json").read_text())
    assert document_encoder(tmp_path / "t.json").encode(["the moon rises"]) == [[0, *plain]]
