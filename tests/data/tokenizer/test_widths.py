"""Numbers of bytes of tokens: those of a text's tokens add up to the text's."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mhmoe_ray.data.tokenizer import END_OF_TEXT, UNKNOWN, DocumentEncoder, token_widths
from mhmoe_ray.data.tokenizer.train import train_bpe, train_unigram
from tests.data.texts import documents
from tests.llama_tokenizer import llama_tokenizer

TEXTS = [*documents("en", 60), "über die Brücke → 東京 нет"]
KINDS = {"bpe": train_bpe, "unigram": train_unigram}
TRAINED = {name: train([*TEXTS], 400) for name, train in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(max_size=60).map(lambda drawn: "the moon " + drawn))
def test_a_documents_tokens_have_its_bytes(kind, text):
    ids = DocumentEncoder(TRAINED[kind]).encode([text])[0]
    widths = token_widths(TRAINED[kind])
    assert widths[ids[0]] == 0  # the start token stands for no text
    assert widths[ids].sum() == len(text.encode())


@pytest.mark.parametrize("kind", KINDS)
def test_added_tokens_have_the_bytes_they_are_written_with(kind):
    tokenizer = Tokenizer.from_str(TRAINED[kind].to_str())
    tokenizer.add_tokens(["→", "東京"])
    text = "the → moon 東京"
    ids = DocumentEncoder(tokenizer).encode([text])[0]
    assert {tokenizer.token_to_id("→"), tokenizer.token_to_id("東京")} <= set(ids)
    assert token_widths(tokenizer)[ids].sum() == len(text.encode())


def test_with_a_space_before_the_first_word_and_bytes_in_brackets():
    tokenizer = llama_tokenizer(TEXTS, 400)
    text = "the moon 🌙 rises"
    ids = DocumentEncoder(tokenizer).encode([text])[0]
    assert token_widths(tokenizer)[ids].sum() == len(text.encode()) + 1


def test_words_that_are_marked_and_bytes_that_no_decoder_tells_of():
    words = [*sorted(set("".join(TEXTS))), "##e", "##s"]
    pieces = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    widths = token_widths(pieces)
    assert widths[pieces.token_to_id("##e")] == 1
    ended = Tokenizer(models.BPE({"a": 0, "a</w>": 1}, [], end_of_word_suffix="</w>"))
    assert token_widths(ended).tolist() == [UNKNOWN, UNKNOWN]  # it has no other letters, and leaves them out
    plain = Tokenizer.from_str(TRAINED["bpe"].to_str())
    plain.decoder = decoders.Fuse()
    assert (token_widths(plain) == token_widths(TRAINED["bpe"])).all()


def test_of_a_tokenizer_that_leaves_spaces_out_nobody_knows_the_bytes():
    letters = sorted({*"".join(TEXTS), *map(chr, range(33, 127))})
    tokenizer = Tokenizer(models.WordPiece({t: i for i, t in enumerate([*letters, *(f"##{c}" for c in letters)])}))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    assert set(token_widths(tokenizer)) == {UNKNOWN}


@pytest.mark.parametrize(
    "model",
    [
        models.BPE({"<unk>": 0, "a": 1}, [], unk_token="<unk>"),
        models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0),
        models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"),
    ],
)
def test_of_a_token_that_stands_for_any_text_nobody_knows_the_bytes(model):
    assert token_widths(Tokenizer(model)).tolist() == [UNKNOWN, 1]


def test_a_tokenizer_that_spells_all_in_bytes_has_no_such_token_in_a_text():
    tokenizer = llama_tokenizer(TEXTS, 400)
    ids = DocumentEncoder(tokenizer).encode(["ab 東京 🌙"])[0]
    assert UNKNOWN not in token_widths(tokenizer)[ids]


def test_the_end_of_a_text_is_of_no_bytes_though_a_tokenizer_calls_it_unknown():
    model = models.BPE({END_OF_TEXT: 0, "a": 1}, [], unk_token=END_OF_TEXT)
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens([END_OF_TEXT])
    assert token_widths(tokenizer).tolist() == [0, 1]
