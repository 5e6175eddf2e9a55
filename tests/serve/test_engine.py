import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from mhmoe_ray.data.tokenizer import END_OF_TEXT
from mhmoe_ray.errors import ServeError
from mhmoe_ray.serve.engine import Engine
from mhmoe_ray.serve.sampling import Sampling

from .conftest import SEQ_LEN, build_model

GREEDY = Sampling(max_tokens=20, temperature=0)


@torch.inference_mode()
def argmax_loop(tokenizer, ids, count):
    """Greedy tokens from the whole sequence at every step, without a cache."""
    model, ids, answer = build_model(), list(ids), []
    for _ in range(count):
        logits_BTV = model(torch.tensor([ids])).logits_BTV
        token = int(logits_BTV[0, -1, : tokenizer.get_vocab_size()].argmax())
        if token == tokenizer.token_to_id(END_OF_TEXT):
            break
        ids.append(token)
        answer.append(token)
    return answer


@pytest.mark.parametrize("prompt", ["", "the quick", "日本 Jäger 🦊"])
def test_greedy_tokens_are_those_of_a_loop_without_cache(engine, tokenizer, prompt):
    ids = engine.encode(prompt)
    assert ids[0] == tokenizer.token_to_id(END_OF_TEXT)
    assert tokenizer.decode(ids) == prompt
    assert list(engine.generate(ids, GREEDY)) == argmax_loop(tokenizer, ids, 20)


@torch.inference_mode()
@pytest.mark.parametrize("split", [1, 7, 19])
def test_cached_logits_equal_uncached(engine, split):
    token_BT = torch.randint(SEQ_LEN, (1, 20), generator=torch.Generator().manual_seed(split))
    model = copy.deepcopy(engine.model).double()  # in float32, rounding alone makes 2e-5
    whole_BTV = model(token_BT).logits_BTV
    caches = model.new_caches(1, 20)
    parts = [model(token_BT[:, :split], caches).logits_BTV]
    parts += [model(token_BT[:, i : i + 1], caches).logits_BTV for i in range(split, 20)]
    torch.testing.assert_close(torch.cat(parts, 1), whole_BTV, rtol=1e-6, atol=1e-6)


def test_seeds_are_reproducible_beside_other_requests(engine):
    ids = engine.encode("the")

    def sample(seed):
        return list(engine.generate(ids, Sampling(30, temperature=1.5, top_p=0.95, seed=seed)))

    alone = [sample(seed) for seed in range(4)]
    assert len({tuple(a) for a in alone}) == 4
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(sample, [*range(4)] * 4)) == alone * 4


def test_interleaved_requests_do_not_touch_each_other(engine):
    """Two answers computed in turns in one thread, as a pool of threads may do it."""
    prompts = [engine.encode("the quick"), engine.encode("日本")]
    alone = [list(engine.generate(ids, GREEDY)) for ids in prompts]
    both = list(zip(*(engine.generate(ids, GREEDY) for ids in prompts), strict=False))
    assert [list(tokens) for tokens in zip(*both, strict=True)] == [a[: len(both)] for a in alone]
    assert not torch.is_inference_mode_enabled()


def test_only_tokens_with_text_are_drawn(engine, tokenizer):
    """The model has rows that the tokenizer does not know."""
    drawn = {t for seed in range(8) for t in engine.generate(engine.encode(""), Sampling(60, 2.0, seed=seed))}
    assert max(drawn) < tokenizer.get_vocab_size() < engine.model.spec.vocab_size


def test_prompt_and_answer_fill_the_context_and_no_more(engine):
    ids = engine.encode("the quick brown fox")
    pieces = list(engine.complete(ids, Sampling(10_000, temperature=0)))
    assert len(ids) + pieces[-1].tokens == SEQ_LEN
    assert pieces[-1].finish_reason == "length"
    assert {p.finish_reason for p in pieces[:-1]} == {None}


def test_the_longest_prompt_leaves_one_token(engine):
    words = "z" * (SEQ_LEN - 2)
    ids = engine.encode(words)
    assert len(ids) == SEQ_LEN - 1
    assert list(engine.complete(ids, GREEDY))[-1].tokens == 1
    with pytest.raises(ServeError, match=f"it has {SEQ_LEN} tokens.*may have {SEQ_LEN}"):
        engine.encode(words + "z")


def test_the_answer_ends_at_the_end_of_text(engine, tokenizer):
    """Two tokens renamed into each other, in the model and in the prompt, rename the answer and change nothing else."""
    ids = engine.encode("the quick")
    tokens = list(engine.generate(ids, GREEDY))
    end, other = tokenizer.token_to_id(END_OF_TEXT), next(t for t in tokens if t not in ids and t != tokens[0])
    rename = {end: other, other: end}
    model = build_model()
    model.embedding.weight[[end, other]] = model.embedding.weight[[other, end]]
    pieces = list(Engine(model, tokenizer, SEQ_LEN).complete([rename.get(t, t) for t in ids], GREEDY))
    before = tokens[: tokens.index(other)]
    assert before
    assert "".join(p.text for p in pieces) == tokenizer.decode(before)
    assert (pieces[-1].tokens, pieces[-1].finish_reason) == (len(before), "stop")


def test_a_stop_string_ends_the_answer(engine):
    ids = engine.encode("the quick")
    whole = "".join(p.text for p in engine.complete(ids, GREEDY))
    stop = whole[5:7]
    pieces = list(engine.complete(ids, GREEDY, [stop]))
    assert "".join(p.text for p in pieces) == whole[: whole.index(stop)]
    assert pieces[-1].finish_reason == "stop"
    assert pieces[-1].tokens < 20
