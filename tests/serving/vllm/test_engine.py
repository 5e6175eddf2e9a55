"""Tests that vLLM as an engine gives the same answers as our own engine."""

import asyncio
import time

import pytest
import torch

from mhmoe_ray.data.tokenizer import END_OF_TEXT
from mhmoe_ray.errors import ServeError
from mhmoe_ray.serving.api.app import create_app
from mhmoe_ray.serving.engine import EngineError, Request, SamplingParams
from mhmoe_ray.serving.load import load_answerer
from mhmoe_ray.spec import ServeSpec
from tests.serving.asking import answer_all, answer_tokens, call
from tests.serving.conftest import SEQ_LEN, build_model, save_checkpoint
from tests.serving.prompts import (
    TOKENIZER_SIZE,
    check_processed_answers,
    greedy_tokens,
    mixed_requests,
    random_prompts,
)
from tests.serving.vllm.conftest import GREEDY, SPEC, greedy_answers, serve_with_vllm
from tests.support.watch import wait_until


@pytest.fixture(scope="module")
def checkpoint(run_dir):
    return save_checkpoint(run_dir, 300, build_model(SPEC))


@pytest.fixture(scope="module")
def answerer(checkpoint):
    with serve_with_vllm(checkpoint) as answerer:
        yield answerer


@pytest.fixture(scope="module")
def engine(answerer):
    return answerer.engine


def test_greedy_answers_equal_those_of_our_own_engine(engine, checkpoint):
    answers = greedy_answers(engine)
    assert answers == [answer_tokens(engine, ids, GREEDY) for ids in random_prompts(32)]
    own_answerer = load_answerer(checkpoint, ServeSpec())
    assert answers == greedy_answers(own_answerer.engine)
    own_answerer.engine.close()


def test_mixed_requests_are_answered_together(engine):
    """Answers have as many tokens as requested, scores if requested, and only tokens of the tokenizer."""
    requests = mixed_requests()
    for request, answer in zip(requests, answer_all(engine, requests), strict=True):
        assert answer.finish_reason == "stop" or len(answer.tokens) == request.sampling_params.max_tokens
        assert all(scored.token < TOKENIZER_SIZE for scored in answer.tokens)
        if request.sampling_params.logprobs is None:
            assert answer.prompt_scores == []
            continue
        for scored in answer.tokens:
            best = [logprob for _, logprob in scored.alternatives]
            assert len(best) == request.sampling_params.logprobs
            assert best == sorted(best, reverse=True)
            assert scored.logprob <= max([0.0, *best]) + 1e-6
        assert len(answer.prompt_scores) == (len(request.prompt_ids) if request.prompt_logprobs else 0)


def test_logprobs_are_independent_of_sampling_params(engine):
    ids = random_prompts(1)[0]
    request = Request(
        ids, SamplingParams(max_tokens=8, temperature=0.8, top_k=5, seed=1, logit_bias={3: 50.0}, logprobs=2)
    )
    [answer] = answer_all(engine, [request])
    assert [scored.token for scored in answer.tokens] == [3] * 8
    token_ids = [*ids, *[3] * 8]
    with torch.inference_mode():
        logprob_TV = build_model(SPEC)(torch.tensor([token_ids])).logits_BTV[0, :, :TOKENIZER_SIZE].log_softmax(-1)
    for i, scored in enumerate(answer.tokens):
        assert scored.logprob == pytest.approx(float(logprob_TV[len(ids) - 1 + i, 3]), abs=1e-3)


def test_equal_seeds_give_equal_answers(engine):
    request = Request(random_prompts(1)[0], SamplingParams(max_tokens=20, temperature=1.2, top_p=0.95, seed=11))
    [expected] = answer_all(engine, [request])
    assert answer_all(engine, [request, *mixed_requests()])[0] == expected
    [other_answer] = answer_all(
        engine, [Request(request.prompt_ids, SamplingParams(max_tokens=20, temperature=1.2, top_p=0.95, seed=12))]
    )
    assert other_answer != expected


def test_prompt_is_scored_without_an_answer(engine):
    ids = random_prompts(1, max_length=SEQ_LEN)[0]
    ids = (*ids, *[1] * (SEQ_LEN - len(ids)))  # a prompt as long as the model allows
    [answer] = answer_all(
        engine, [Request(ids, SamplingParams.model_construct(max_tokens=0, logprobs=1), prompt_logprobs=True)]
    )
    assert answer.tokens == []
    assert answer.finish_reason == "length"
    assert [scored.token for scored in answer.prompt_scores] == list(ids)


def test_end_of_document_ends_the_answer(engine, tokenizer):
    end = tokenizer.token_to_id(END_OF_TEXT)
    [answer] = answer_all(
        engine, [Request((1, 2), SamplingParams(max_tokens=20, temperature=0, logit_bias={end: 100.0}))]
    )
    assert (answer.tokens, answer.finish_reason) == ([], "stop")


def test_penalty_and_limits_of_end_tokens_are_those_of_transformers(engine, tokenizer):
    check_processed_answers(engine, build_model(SPEC), tokenizer.token_to_id(END_OF_TEXT))


def test_closed_answer_is_aborted(engine):
    async def close_early():
        answer = engine.generate(
            Request((1, 2), SamplingParams(max_tokens=SEQ_LEN - 2, temperature=0, logit_bias={0: -100.0}))
        )
        await anext(answer)
        await answer.aclose()
        return [_ async for _ in engine.generate(Request((3,), SamplingParams(max_tokens=3, temperature=0)))]

    initial_stats = engine.stats()
    asyncio.run(close_early())
    final_stats = engine.stats()
    assert final_stats.answer_tokens - initial_stats.answer_tokens < SEQ_LEN - 2
    assert (final_stats.running, final_stats.waiting) == (0, 0)
    assert final_stats.requests == initial_stats.requests + 2


def idle_stats(engine):
    """Return the stats of an engine that has read the experts' counts since its last request."""
    # The engine reads the counts in the round after its last request, so equal counts in two looks are complete.
    looks = []

    def is_stable():
        looks.append(engine.stats())
        time.sleep(0.5)
        return engine.stats().running == 0 and engine.stats().count_LE == looks[-1].count_LE

    wait_until(is_stable, "an idle engine")
    return looks[-1]


def test_stats_count_tokens_and_routes(engine):
    # The test before may have aborted a request a moment ago.
    initial_stats = idle_stats(engine)
    # No earlier prompt starts with these tokens, so nothing of the prompt is in the cache.
    ids = tuple(range(100, 150))
    answer_all(engine, [Request(ids, SamplingParams(max_tokens=5, temperature=0, logit_bias={0: -100.0}))])
    final_stats = engine.stats()
    assert final_stats.prompt_tokens - initial_stats.prompt_tokens == 50
    assert final_stats.answer_tokens - initial_stats.answer_tokens == 5
    assert final_stats.first_token.count - initial_stats.first_token.count == 1
    assert final_stats.each_token.count - initial_stats.each_token.count == 4
    assert final_stats.step_tokens - initial_stats.step_tokens == 50 + 5
    # The engine reads the counts when it becomes idle, which is a moment after the last answer, so wait for them.
    count_LE = wait_until(lambda: (c := engine.stats().count_LE) != initial_stats.count_LE and c, "the experts' counts")
    routes = torch.tensor(count_LE) - torch.tensor(initial_stats.count_LE)
    assert routes.sum() == (50 + 4) * SPEC.moe.heads * SPEC.moe.top_k


def test_request_that_vllm_refuses_fails_alone(engine):
    good_request = Request((1, 2), GREEDY)

    async def collect_tokens(request):
        return [scored.token async for update in engine.generate(request) for scored in update.tokens]

    async def run_both():
        # The API would refuse this request, so the engine gets it directly.
        bad_request = Request((1, 2), SamplingParams.model_construct(max_tokens=5, top_k=-7))
        return await asyncio.gather(*(collect_tokens(r) for r in (bad_request, good_request)), return_exceptions=True)

    failure, answer = asyncio.run(run_both())
    assert isinstance(failure, EngineError)
    assert answer == answer_tokens(engine, good_request.prompt_ids, GREEDY)
    assert engine.failure_reason is None


def test_api_answers_with_vllm(answerer):
    app = create_app(answerer, "tiny", ServeSpec(engine="vllm"))
    body = {"prompt": "the quick", "max_tokens": 8, "temperature": 0, "logprobs": 1, "echo": True}
    answer = call(app, "POST", "/v1/completions", json=body).json()
    [choice] = answer["choices"]
    assert choice["text"].startswith("the quick")
    assert (
        answer["usage"]["prompt_tokens"] == 1 + len(choice["logprobs"]["tokens"]) - answer["usage"]["completion_tokens"]
    )
    ids = answerer.encode("the quick")
    expected = greedy_tokens(build_model(SPEC), ids, 8, end_tokens={0})
    assert choice["text"] == "the quick" + answerer.decode(expected)
    metrics = call(app, "GET", "/metrics").text
    assert 'mhmoe_expert_routes_total{expert="0",layer="0",model="tiny",replica=""}' in metrics


@pytest.mark.parametrize(
    ("changed", "reason"),
    [({"backbone": "subln"}, "subln backbone"), ({"d_model": 32, "attention_heads": 1}, "a sub-token has 16 here")],
)
def test_unsupported_model_is_refused_in_one_line(run_dir, changed, reason):
    model = build_model(SPEC.model_copy(update=changed))
    with pytest.raises(ServeError, match=f"engine vllm: .*{reason}.*torch"):
        load_answerer(save_checkpoint(run_dir, 310 + len(changed), model), ServeSpec(engine="vllm"))
