"""Tests of answers as text: stop strings, lengths, and the bytes of tokens."""

import asyncio

import pytest
from tokenizers import Tokenizer, decoders, models

from mhmoe_ray.errors import ServeError
from mhmoe_ray.serving.detokenizer import TextDecoder, TokenBytes
from mhmoe_ray.serving.engine import Request, SamplingParams
from tests.serving.asking import answer_pieces
from tests.serving.conftest import SEQ_LEN
from tests.serving.tokenizers import DECODERS, TOKENIZERS
from tests.support.llama_tokenizer import llama_tokenizer

GREEDY = SamplingParams(max_tokens=20, temperature=0)


def test_prompt_and_answer_fill_the_context(answerer):
    ids = answerer.encode("the quick brown fox")
    pieces = answer_pieces(answerer, ids, SamplingParams(max_tokens=10_000, temperature=0))
    assert len(ids) + pieces[-1].token_count == SEQ_LEN
    assert pieces[-1].finish_reason == "length"
    assert {p.finish_reason for p in pieces[:-1]} == {None}


def test_longest_prompt_leaves_room_for_one_token(answerer):
    ids = answerer.encode("z" * (SEQ_LEN - 2))
    answerer.check_length(ids, has_answer=True)
    assert answer_pieces(answerer, ids, GREEDY)[-1].token_count == 1
    longer_ids = answerer.encode("z" * (SEQ_LEN - 1))
    answerer.check_length(longer_ids, has_answer=False)
    with pytest.raises(ServeError, match=f"it has {SEQ_LEN} tokens.*may have {SEQ_LEN}"):
        answerer.check_length(longer_ids, has_answer=True)


def test_stop_string_ends_the_answer(answerer):
    ids = answerer.encode("the quick")
    full_text = "".join(p.text for p in answer_pieces(answerer, ids, GREEDY))
    stop = full_text[5:7]
    pieces = answer_pieces(answerer, ids, GREEDY.model_copy(update={"stop": [stop]}))
    assert "".join(p.text for p in pieces) == full_text[: full_text.index(stop)]
    assert pieces[-1].finish_reason == "stop"
    assert pieces[-1].token_count < 20


def test_closing_an_answer_ends_its_computation(answerer):
    async def close_early():
        request = Request(tuple(answerer.encode("a")), SamplingParams(max_tokens=50, temperature=0))
        answer = answerer.answer(request)
        await anext(answer)
        await answer.aclose()
        while answerer.engine.stats().running:  # wait until the engine has ended the request
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(close_early(), 60))


def test_replacement_character_in_the_vocabulary_is_ordinary_text():
    tokenizer = llama_tokenizer(["a b", "\ufffd \ufffd"], 300)
    bytes_by_token = TokenBytes(tokenizer, TextDecoder(tokenizer))
    token_bytes = [bytes_by_token[tokenizer.token_to_id(name)] for name in ("\ufffd", "a", "<0xE6>")]
    assert token_bytes == ["\ufffd".encode(), b"a", b"\xe6"]


def test_a_name_that_only_begins_like_a_byte_is_ordinary_text():
    tokenizer = Tokenizer(models.BPE({"<unk>": 0, "a": 1, "<0xEF>": 2, "<0xy\ufffd": 3}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    bytes_by_token = TokenBytes(tokenizer, TextDecoder(tokenizer))
    assert [bytes_by_token[token] for token in (1, 2, 3)] == [b"a", b"\xef", "<0xy\ufffd".encode()]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("text", ["the quick brown", "ein älterer Jäger", "日本 🦊"])
def test_token_bytes_join_to_the_text(kind, text):
    bytes_by_token = TokenBytes(TOKENIZERS[kind], DECODERS[kind])
    ids = TOKENIZERS[kind].encode(text, add_special_tokens=False).ids
    assert b"".join(bytes_by_token[token] for token in ids).decode().strip() == text
