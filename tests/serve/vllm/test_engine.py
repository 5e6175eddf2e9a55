"""vLLM behind our interface: clients see the same as with our own engine."""

import asyncio

import pytest
import torch

from mhmoe_ray.data.tokenizer import END_OF_TEXT
from mhmoe_ray.errors import ServeError
from mhmoe_ray.serve.api.app import create_app
from mhmoe_ray.serve.engine import EngineError, Request, Sampling
from mhmoe_ray.serve.load import load_answerer
from mhmoe_ray.spec import ServeSpec
from tests.serve.asking import call, together, tokens
from tests.serve.conftest import SEQ_LEN, build_model, save
from tests.serve.test_torch_engine import KNOWN, argmax_loop, mixed, prompts
from tests.serve.vllm.conftest import GREEDY, SPEC, greedy_of_32, served
from tests.watch import wait_until


@pytest.fixture(scope="module")
def checkpoint(run_dir):
    return save(run_dir, 300, build_model(SPEC))


@pytest.fixture(scope="module")
def answerer(checkpoint):
    with served(checkpoint) as answerer:
        yield answerer


@pytest.fixture(scope="module")
def engine(answerer):
    return answerer.engine


def test_greedy_answers_are_the_same_alone_and_among_32_and_those_of_our_own_engine(engine, checkpoint):
    found = greedy_of_32(engine)
    assert found == [tokens(engine, ids, GREEDY) for ids in prompts(32)]
    own = load_answerer(checkpoint, ServeSpec())
    assert found == greedy_of_32(own.engine)
    own.engine.close()


def test_many_kinds_of_requests_at_once(engine):
    """Answers have as many tokens as asked for, scores where asked for, and no token that the tokenizer does not
    have."""
    asked = mixed()
    for request, answer in zip(asked, together(engine, asked), strict=True):
        assert answer.finish == "stop" or len(answer.tokens) == request.sampling.max_tokens
        assert all(scored.token < KNOWN for scored in answer.tokens)
        if request.logprobs is None:
            assert answer.prompt == []
            continue
        for scored in answer.tokens:
            best = [logprob for _, logprob in scored.alternatives]
            assert len(best) == request.logprobs
            assert best == sorted(best, reverse=True)
            assert scored.logprob <= max([0.0, *best]) + 1e-6
        assert len(answer.prompt) == (len(request.prompt_ids) if request.prompt_logprobs else 0)


def test_logprobs_are_the_models_own_whatever_moves_the_choice(engine):
    ids = prompts(1)[0]
    moved = Request(ids, Sampling(8, 0.8, top_k=5, seed=1, logit_bias={3: 50.0}), logprobs=2)
    [answer] = together(engine, [moved])
    assert [scored.token for scored in answer.tokens] == [3] * 8
    whole = [*ids, *[3] * 8]
    with torch.inference_mode():
        logprob_TV = build_model(SPEC)(torch.tensor([whole])).logits_BTV[0, :, :KNOWN].log_softmax(-1)
    for at, scored in enumerate(answer.tokens):
        assert scored.logprob == pytest.approx(float(logprob_TV[len(ids) - 1 + at, 3]), abs=1e-3)


def test_a_seed_gives_the_same_answer_again_whatever_else_is_computed(engine):
    drawn = Request(prompts(1)[0], Sampling(20, 1.2, top_p=0.95, seed=11))
    [alone] = together(engine, [drawn])
    assert together(engine, [drawn, *mixed()])[0] == alone
    [other] = together(engine, [Request(drawn.prompt_ids, Sampling(20, 1.2, top_p=0.95, seed=12))])
    assert other != alone


def test_a_prompt_is_only_scored_where_no_answer_is_asked_for(engine):
    ids = prompts(1, longest=SEQ_LEN)[0]
    ids = (*ids, *[1] * (SEQ_LEN - len(ids)))  # as long as the model allows
    [answer] = together(engine, [Request(ids, Sampling(0), logprobs=1, prompt_logprobs=True)])
    assert answer.tokens == []
    assert answer.finish == "length"
    assert [scored.token for scored in answer.prompt] == list(ids)


def test_an_answer_ends_with_the_end_of_a_document_which_is_no_part_of_it(engine, tokenizer):
    end = tokenizer.token_to_id(END_OF_TEXT)
    [answer] = together(engine, [Request((1, 2), Sampling(20, temperature=0, logit_bias={end: 100.0}))])
    assert (answer.tokens, answer.finish) == ([], "stop")


def test_what_nobody_wants_any_more_is_given_up(engine):
    async def leave():
        answer = engine.generate(Request((1, 2), Sampling(SEQ_LEN - 2, temperature=0, logit_bias={0: -100.0})))
        await anext(answer)
        await answer.aclose()
        return [_ async for _ in engine.generate(Request((3,), Sampling(3, temperature=0)))]

    before = engine.stats()
    asyncio.run(leave())
    after = engine.stats()
    assert after.answer_tokens - before.answer_tokens < SEQ_LEN - 2
    assert (after.running, after.waiting) == (0, 0)
    assert after.requests == before.requests + 2


def test_it_counts_what_it_does(engine):
    before = engine.stats()
    ids = tuple(range(100, 150))  # nothing before began like it
    together(engine, [Request(ids, Sampling(5, temperature=0, logit_bias={0: -100.0}))])
    after = engine.stats()
    assert after.prompt_tokens - before.prompt_tokens == 50
    assert after.answer_tokens - before.answer_tokens == 5
    assert after.first_token.count - before.first_token.count == 1
    assert after.each_token.count - before.each_token.count == 4
    assert after.step_tokens - before.step_tokens == 50 + 5
    # It counts once it rests, a moment after the last answer.
    counted = wait_until(lambda: (c := engine.stats().count_LE) != before.count_LE and c, "the experts' counts")
    routes = torch.tensor(counted) - torch.tensor(before.count_LE)
    assert routes.sum() == (50 + 4) * SPEC.moe.heads * SPEC.moe.top_k


def test_what_vllm_does_not_take_fails_alone(engine):
    usual = Request((1, 2), GREEDY)

    async def collected(request):
        return [scored.token async for update in engine.generate(request) for scored in update.tokens]

    async def beside():
        strange = Request((1, 2), Sampling(5, top_k=-7))  # which the API refuses
        return await asyncio.gather(*(collected(r) for r in (strange, usual)), return_exceptions=True)

    failed, answer = asyncio.run(beside())
    assert isinstance(failed, EngineError)
    assert answer == tokens(engine, usual.prompt_ids, GREEDY)
    assert engine.why_broken is None


def test_the_api_answers_with_it(answerer):
    app = create_app(answerer, "tiny", ServeSpec(engine="vllm"))
    body = {"prompt": "the quick", "max_tokens": 8, "temperature": 0, "logprobs": 1, "echo": True}
    answer = call(app, "POST", "/v1/completions", json=body).json()
    [choice] = answer["choices"]
    assert choice["text"].startswith("the quick")
    assert (
        answer["usage"]["prompt_tokens"] == 1 + len(choice["logprobs"]["tokens"]) - answer["usage"]["completion_tokens"]
    )
    ids = answerer.encode("the quick")
    expected = argmax_loop(build_model(SPEC), ids, 8, ends={0})
    assert choice["text"] == "the quick" + answerer.decode(expected)
    metrics = call(app, "GET", "/metrics").text
    assert 'mhmoe_expert_routes_total{expert="0",layer="0",model="tiny",replica=""}' in metrics


@pytest.mark.parametrize(
    ("changed", "reason"),
    [({"backbone": "subln"}, "subln backbone"), ({"d_model": 32, "attention_heads": 1}, "d / h is 16 here")],
)
def test_a_model_that_vllm_has_no_layers_for_is_refused_in_one_line(run_dir, changed, reason):
    model = build_model(SPEC.model_copy(update=changed))
    with pytest.raises(ServeError, match=f"engine vllm: .*{reason}.*torch"):
        load_answerer(save(run_dir, 310 + len(changed), model), ServeSpec(engine="vllm"))
