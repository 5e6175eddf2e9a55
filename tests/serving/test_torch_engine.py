"""Tests of our own engine (PyTorch, not vLLM) against the model itself, for single requests and for many at once."""

import asyncio
import threading

import pytest
import torch

from mhmoe_ray.data.tokenizer import END_OF_TEXT
from mhmoe_ray.serving.engine import BusyError, EngineError, Request, SamplingParams
from mhmoe_ray.serving.engine.scheduler import PREFILL_CHUNK
from mhmoe_ray.serving.engine.torch_engine import PREFILL_BUDGET, TorchEngine, pack_model
from mhmoe_ray.spec import ServeSpec
from tests.serving.asking import answer_all, answer_tokens
from tests.serving.conftest import SEQ_LEN, SPEC, build_model
from tests.serving.own import create_answerer
from tests.serving.prompts import (
    TOKENIZER_SIZE,
    check_processed_answers,
    greedy_tokens,
    mixed_requests,
    random_prompts,
)
from tests.support.paged import logits_in_parts

GREEDY = SamplingParams(max_tokens=20, temperature=0)


def create_engine(model, seq_len=SEQ_LEN, **overrides):
    """Return an engine in float32 without end tokens, for 32 concurrent requests; `overrides` change its settings."""
    packed_model = pack_model(model, torch.float32)
    spec = ServeSpec(**{"max_concurrency": 32, "max_waiting": 1000, "cpus_per_replica": 1, **overrides})
    return TorchEngine(model, frozenset(), TOKENIZER_SIZE, seq_len, spec, packed_model)


@pytest.fixture(scope="module")
def engine():
    """Yield an engine that never ends an answer before its maximum number of tokens."""
    engine = create_engine(build_model())
    yield engine
    engine.close()


@torch.inference_mode()
@pytest.mark.parametrize("split", [1, 7, 19])
def test_logits_in_chunks_equal_those_of_the_whole_sequence(split):
    token_BT = torch.randint(SEQ_LEN, (2, 20), generator=torch.Generator().manual_seed(split))
    model = build_model().double()  # in float32, rounding alone gives differences of 2e-5
    logits_BTV = logits_in_parts(model, token_BT, [split, *[1] * (20 - split)])
    torch.testing.assert_close(logits_BTV, model(token_BT).logits_BTV, rtol=1e-6, atol=1e-6)


@pytest.mark.cpu
def test_concurrent_answers_equal_single_ones_bit_for_bit(engine):
    requests = mixed_requests()
    single_answers = [answer_all(engine, [request])[0] for request in requests]
    initial_stats = engine.stats()
    assert answer_all(engine, requests) == single_answers
    final_stats = engine.stats()
    # With more than 8 tokens in a step on average, requests must have shared steps.
    assert (final_stats.step_tokens - initial_stats.step_tokens) / (final_stats.steps - initial_stats.steps) > 8
    model = build_model()
    for request, answer in zip(requests, single_answers, strict=True):
        assert len(answer.tokens) == request.sampling_params.max_tokens
        if request.sampling_params.temperature == 0:
            expected = greedy_tokens(model, request.prompt_ids, request.sampling_params.max_tokens)
            assert [scored.token for scored in answer.tokens] == expected


@torch.inference_mode()
def test_logprobs_equal_those_of_the_model(engine):
    """Scores are log-probabilities of the model before temperature, top-k and biases.

    The tokens of the prompt have scores too, except the first one.
    """
    model = build_model()
    for ids in random_prompts(6):
        sampling = SamplingParams(max_tokens=8, temperature=0.8, top_k=5, seed=1, logit_bias={3: 2.0}, logprobs=4)
        [answer] = answer_all(engine, [Request(ids, sampling, prompt_logprobs=True)])
        scores = [*answer.prompt_scores, *answer.tokens]
        token_ids = [scored.token for scored in scores]
        assert token_ids[: len(ids)] == list(ids)
        logprob_TV = model(torch.tensor([token_ids])).logits_BTV[0, :, :TOKENIZER_SIZE].log_softmax(-1)
        assert scores[0].logprob is None
        for i, scored in enumerate(scores[1:]):
            assert scored.logprob == pytest.approx(float(logprob_TV[i, scored.token]), abs=1e-3)
            best = logprob_TV[i].topk(4)
            assert [lp for _, lp in scored.alternatives] == pytest.approx(best.values.tolist(), abs=1e-3)


def test_prompt_longer_than_the_budget_gets_the_same_answer():
    model, length = build_model(), PREFILL_BUDGET["cpu"] + 50
    engine = create_engine(model, seq_len=length + 20)
    ids = torch.randint(TOKENIZER_SIZE, (length,), generator=torch.Generator().manual_seed(2)).tolist()
    try:
        assert answer_tokens(engine, ids, GREEDY) == greedy_tokens(build_model(), ids, 20)
        assert engine.stats().steps == 2 + 19
    finally:
        engine.close()


@pytest.mark.cpu
def test_cached_prefix_gives_the_same_bits():
    engine = create_engine(build_model(), seq_len=4 * PREFILL_CHUNK)
    ids = tuple(
        torch.randint(TOKENIZER_SIZE, (3 * PREFILL_CHUNK,), generator=torch.Generator().manual_seed(4)).tolist()
    )
    request = Request(ids, SamplingParams(max_tokens=10, temperature=0, logprobs=2))
    second_request = Request(
        (*ids[: 2 * PREFILL_CHUNK], 7, 8), SamplingParams(max_tokens=10, temperature=0, logprobs=2)
    )
    try:
        answers = answer_all(engine, [request])
        assert engine.stats().reused_tokens == 0
        assert answer_all(engine, [request]) == answers
        # The last token of a prompt is always computed, and with it the whole chunk that has it, here the third.
        assert engine.stats().reused_tokens == 2 * PREFILL_CHUNK
        second_answers = answer_all(engine, [second_request])
        assert engine.stats().reused_tokens == 4 * PREFILL_CHUNK
    finally:
        engine.close()
    fresh_engine = create_engine(build_model(), seq_len=4 * PREFILL_CHUNK)
    try:
        assert answer_all(fresh_engine, [second_request]) == second_answers
    finally:
        fresh_engine.close()


@pytest.mark.cpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_second_turn_gets_the_bits_of_a_fresh_engine(tokenizer, precision):
    """A second turn is answered by an engine with a cache as by a fresh engine, bit for bit.

    The first turn's answer completes a chunk of the second prompt, which must not be reused: decoding gives
    other bits than prefill.
    """
    spec, sampling = (
        ServeSpec(precision=precision),
        SamplingParams(max_tokens=PREFILL_CHUNK, temperature=0, logit_bias={0: -100.0}),
    )
    first_prompt = tuple(
        torch.randint(
            1, TOKENIZER_SIZE, (PREFILL_CHUNK + PREFILL_CHUNK // 2,), generator=torch.Generator().manual_seed(6)
        ).tolist()
    )
    warm_engine, fresh_engine = (
        create_answerer(build_model(), tokenizer, 4 * PREFILL_CHUNK, spec).engine for _ in range(2)
    )
    try:
        [first_answer] = answer_all(warm_engine, [Request(first_prompt, sampling)])
        second_turn = Request(
            (*first_prompt, *(scored.token for scored in first_answer.tokens), 5, 6),
            sampling.model_copy(update={"logprobs": 2}),
        )
        assert answer_all(warm_engine, [second_turn]) == answer_all(fresh_engine, [second_turn])
        # Only the first chunk is reused: the prompt of the first turn fills no second one.
        assert warm_engine.stats().reused_tokens == PREFILL_CHUNK
    finally:
        warm_engine.close()
        fresh_engine.close()


def test_requests_wait_for_room_in_the_cache():
    served_model, running = build_model(), []
    engine = create_engine(served_model, cache_tokens=2 * SEQ_LEN)
    served_model.register_forward_hook(lambda *_: running.append(engine.stats().running))
    requests = [Request(ids, GREEDY) for ids in random_prompts(12)]
    try:
        answers = answer_all(engine, requests)
        stats = engine.stats()
    finally:
        engine.close()
    assert 1 < max(running) < 12
    model = build_model()
    for request, answer in zip(requests, answers, strict=True):
        assert [s.token for s in answer.tokens] == greedy_tokens(model, request.prompt_ids, 20)
    assert (stats.running, stats.waiting, stats.cache_used, stats.requests) == (0, 0, 0, 12)


def test_expert_counts_exclude_padding(engine):
    initial_stats = engine.stats()
    answer_all(engine, [Request(random_prompts(1)[0], SamplingParams(max_tokens=5, temperature=0))])
    final_stats = engine.stats()
    routes = torch.tensor(final_stats.count_LE) - torch.tensor(initial_stats.count_LE)
    assert routes.shape == (1, SPEC.moe.experts)
    assert routes.sum() == (final_stats.step_tokens - initial_stats.step_tokens) * SPEC.moe.heads * SPEC.moe.top_k


class StepGate:
    """Gate that stops a model before each step until it is opened."""

    def __init__(self, model):
        self.open, self.step_started, self.steps = threading.Event(), threading.Event(), 0
        model.register_forward_pre_hook(self._wait)

    def _wait(self, *_):
        self.steps += 1
        self.step_started.set()
        assert self.open.wait(60)


def test_request_beyond_the_queue_is_refused_at_once():
    model = build_model()
    gate = StepGate(model)
    engine = create_engine(model, max_concurrency=1, max_waiting=2)

    async def send_requests():
        tasks = [asyncio.create_task(anext(engine.generate(Request((1,), GREEDY))))]
        await asyncio.to_thread(gate.step_started.wait, 60)
        tasks += [asyncio.create_task(anext(engine.generate(Request((1,), GREEDY)))) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(BusyError, match="2 requests wait already"):
            await anext(engine.generate(Request((1,), GREEDY)))
        assert engine.stats().waiting == 2
        gate.open.set()
        await asyncio.gather(*tasks)

    try:
        asyncio.run(send_requests())
    finally:
        engine.close()


def test_requests_sent_together_fill_all_slots_before_one_is_refused():
    model = build_model()
    gate = StepGate(model)
    engine = create_engine(model, max_concurrency=4, max_waiting=1)

    async def send_requests():
        tasks = [asyncio.create_task(anext(engine.generate(Request((1,), GREEDY))))]
        await asyncio.to_thread(gate.step_started.wait, 60)
        tasks += [asyncio.create_task(anext(engine.generate(Request((1,), GREEDY)))) for _ in range(5)]
        await asyncio.sleep(0)
        gate.open.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    try:
        *updates, refusal = asyncio.run(send_requests())
    finally:
        engine.close()
    assert [len(update.tokens) for update in updates] == [1] * 5
    assert isinstance(refusal, BusyError)


def test_clients_take_turns():
    """A client with many requests does not make another wait for all of them, nor for the one that is running."""
    model = build_model()
    gate = StepGate(model)
    engine = create_engine(model, max_concurrency=1)
    finished_clients = []

    async def ask(client):
        async for update in engine.generate(
            Request((1, 2), SamplingParams(max_tokens=2, temperature=0), client=client)
        ):
            if update.finish_reason:
                finished_clients.append(client)

    async def send_requests():
        tasks = [asyncio.create_task(ask("many")) for _ in range(4)]
        await asyncio.to_thread(gate.step_started.wait, 60)
        tasks += [asyncio.create_task(ask("few")) for _ in range(2)]
        await asyncio.sleep(0.01)
        gate.open.set()
        await asyncio.gather(*tasks)

    try:
        asyncio.run(send_requests())
    finally:
        engine.close()
    assert finished_clients == ["many", "few", "many", "few", "many", "many"]


def test_closed_answer_is_not_computed_further():
    model = build_model()
    engine = create_engine(model, seq_len=4000)
    steps = []
    model.register_forward_hook(lambda *_: steps.append(1))

    async def close_early():
        async for _ in engine.generate(Request((1, 2), SamplingParams(max_tokens=3900, temperature=0))):
            if len(steps) > 4:
                break

    async def run_two_requests():
        await close_early()
        [_ async for _ in engine.generate(Request((1, 2), SamplingParams(max_tokens=3, temperature=0)))]

    try:
        asyncio.run(run_two_requests())
        assert len(steps) < 2000  # the whole answer would take 3900
        assert engine.stats().running == 0
    finally:
        engine.close()


def test_engine_failure_is_reported_to_all_requests():
    model = build_model()

    def fail(*_):
        raise RuntimeError("out of something")

    model.register_forward_hook(fail)
    engine = create_engine(model)
    for _ in range(2):
        with pytest.raises(EngineError, match="RuntimeError: out of something"):
            answer_all(engine, [Request((1,), GREEDY)] * 2)
    assert engine.failure_reason == "RuntimeError: out of something"
    engine.close()


def test_failing_request_fails_alone():
    engine = create_engine(build_model())
    # The API would refuse this request, so the engine gets it directly.
    bad_request = Request((1,), SamplingParams(max_tokens=5, logit_bias={TOKENIZER_SIZE + 7: 1.0}))

    async def run_both():
        return await asyncio.gather(*(collect_tokens(r) for r in (bad_request, good_request)), return_exceptions=True)

    async def collect_tokens(request):
        return [scored.token async for update in engine.generate(request) for scored in update.tokens]

    good_request = Request((1, 2), GREEDY)
    failure, answer = asyncio.run(run_both())
    assert isinstance(failure, EngineError)
    assert "IndexError" in str(failure)
    assert answer == greedy_tokens(build_model(), (1, 2), 20)
    assert engine.failure_reason is None
    assert engine.stats().running == 0
    engine.close()


@pytest.mark.parametrize("prompt", ["", "the quick", "日本 Jäger 🦊"])
def test_greedy_answer_equals_a_loop_without_cache(answerer, tokenizer, prompt):
    ids = answerer.encode(prompt)
    end = tokenizer.token_to_id(END_OF_TEXT)
    assert ids[0] == end
    assert tokenizer.decode(ids) == prompt
    expected = greedy_tokens(build_model(), ids, 20, tokenizer.get_vocab_size(), {end})
    assert answer_tokens(answerer.engine, ids, GREEDY) == expected


def test_penalty_and_limits_of_end_tokens_are_those_of_transformers(answerer, tokenizer):
    check_processed_answers(answerer.engine, build_model(), tokenizer.token_to_id(END_OF_TEXT))


def test_only_tokens_with_text_are_sampled(answerer, tokenizer):
    """Tokens that the tokenizer does not have are never sampled, although the model has rows for them."""
    requests = [
        Request(tuple(answerer.encode("")), SamplingParams(max_tokens=60, temperature=2.0, seed=seed))
        for seed in range(8)
    ]
    sampled_tokens = {scored.token for answer in answer_all(answerer.engine, requests) for scored in answer.tokens}
    assert max(sampled_tokens) < tokenizer.get_vocab_size() < SPEC.vocab_size


@pytest.mark.parametrize("backbone", ["llama", "subln"])
def test_bfloat16_scores_are_close_to_float32(tokenizer, backbone):
    actual, expected = (score_prompt(backbone, precision, tokenizer) for precision in ("bfloat16", "float32"))
    for rough, exact in zip(actual.prompt_scores[1:], expected.prompt_scores[1:], strict=True):
        assert rough.logprob == pytest.approx(exact.logprob, abs=0.2)
    assert actual.prompt_scores != expected.prompt_scores


def score_prompt(backbone, precision, tokenizer):
    """Return the scores of a fixed prompt, as an answer without tokens, by a model of this backbone and precision."""
    model = build_model(SPEC.model_copy(update={"backbone": backbone}))
    answerer = create_answerer(model, tokenizer, SEQ_LEN, ServeSpec(precision=precision))
    ids = tuple(answerer.encode("the quick brown fox"))
    [answer] = answer_all(
        answerer.engine, [Request(ids, SamplingParams.model_construct(max_tokens=0, logprobs=0), prompt_logprobs=True)]
    )
    answerer.engine.close()
    return answer


def test_different_seeds_give_different_answers(answerer):
    ids = tuple(answerer.encode("the"))
    requests = [
        Request(ids, SamplingParams(max_tokens=30, temperature=1.5, top_p=0.95, seed=seed)) for seed in range(4)
    ]
    answers = answer_all(answerer.engine, requests)
    assert len({tuple(s.token for s in answer.tokens) for answer in answers}) == 4


def test_answer_ends_at_the_end_of_text(answerer, tokenizer):
    """An answer ends before the end-of-text token.

    The test exchanges the embeddings of that token and of a token in a known answer, and both tokens in the prompt. So
    the model predicts the end-of-text token where the known answer has the other token.
    """
    ids = answerer.encode("the quick")
    original_tokens = answer_tokens(answerer.engine, ids, GREEDY)
    end, swapped_token = (
        tokenizer.token_to_id(END_OF_TEXT),
        next(t for t in original_tokens if t not in ids and t != original_tokens[0]),
    )
    swap = {end: swapped_token, swapped_token: end}
    model = build_model()
    model.embedding.weight[[end, swapped_token]] = model.embedding.weight[[swapped_token, end]]
    swapped_answerer = create_answerer(model, tokenizer, SEQ_LEN, ServeSpec())
    request = Request(tuple(swap.get(t, t) for t in ids), GREEDY)
    [answer] = answer_all(swapped_answerer.engine, [request])
    swapped_answerer.engine.close()
    expected = original_tokens[: original_tokens.index(swapped_token)]
    assert expected
    assert ([scored.token for scored in answer.tokens], answer.finish_reason) == (expected, "stop")
