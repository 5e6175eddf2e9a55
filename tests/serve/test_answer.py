"""The way from a prompt's text to an answer's text."""

import asyncio

import pytest

from mhmoe_ray.errors import ServeError
from mhmoe_ray.serve.detokenizer import TextDecoder, TokenBytes
from mhmoe_ray.serve.engine import Request, Sampling
from tests.llama_tokenizer import llama_tokenizer
from tests.serve.asking import pieces
from tests.serve.conftest import SEQ_LEN
from tests.serve.test_detokenizer import DECODERS, TOKENIZERS

GREEDY = Sampling(max_tokens=20, temperature=0)


def test_prompt_and_answer_fill_the_context_and_no_more(answerer):
    ids = answerer.encode("the quick brown fox")
    found = pieces(answerer, ids, Sampling(10_000, temperature=0))
    assert len(ids) + found[-1].tokens == SEQ_LEN
    assert found[-1].finish_reason == "length"
    assert {p.finish_reason for p in found[:-1]} == {None}


def test_the_longest_prompt_leaves_one_token(answerer):
    ids = answerer.encode("z" * (SEQ_LEN - 2))
    answerer.check_length(ids, answer=True)
    assert pieces(answerer, ids, GREEDY)[-1].tokens == 1
    longer = answerer.encode("z" * (SEQ_LEN - 1))
    answerer.check_length(longer, answer=False)
    with pytest.raises(ServeError, match=f"it has {SEQ_LEN} tokens.*may have {SEQ_LEN}"):
        answerer.check_length(longer, answer=True)


def test_a_stop_string_ends_the_answer(answerer):
    ids = answerer.encode("the quick")
    whole = "".join(p.text for p in pieces(answerer, ids, GREEDY))
    stop = whole[5:7]
    found = pieces(answerer, ids, GREEDY, [stop])
    assert "".join(p.text for p in found) == whole[: whole.index(stop)]
    assert found[-1].finish_reason == "stop"
    assert found[-1].tokens < 20


def test_an_answer_whose_reader_leaves_ends_the_work(answerer):
    async def leave():
        request = Request(tuple(answerer.encode("a")), Sampling(50, temperature=0))
        answer = answerer.answer(request)
        await anext(answer)
        await answer.aclose()
        while answerer.engine.stats().running:  # until the engine has seen it
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(leave(), 60))


def test_a_replacement_character_in_the_vocabulary_is_a_text_like_others():
    tokenizer = llama_tokenizer(["a b", "\ufffd \ufffd"], 300)
    parts = TokenBytes(tokenizer, TextDecoder(tokenizer))
    found = [parts[tokenizer.token_to_id(name)] for name in ("\ufffd", "a", "<0xE6>")]
    assert found == ["\ufffd".encode(), b"a", b"\xe6"]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("text", ["the quick brown", "ein älterer Jäger", "日本 🦊"])
def test_texts_of_tokens_join_to_the_text(kind, text):
    parts = TokenBytes(TOKENIZERS[kind], DECODERS[kind])
    ids = TOKENIZERS[kind].encode(text, add_special_tokens=False).ids
    assert b"".join(parts[token] for token in ids).decode().strip() == text
