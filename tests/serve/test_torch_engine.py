"""Our own engine against the model itself, alone and with many requests at once."""

import asyncio
import threading

import pytest
import torch

from mhmoe_ray.data.tokenizer import END_OF_TEXT
from mhmoe_ray.serve.engine import BusyError, EngineError, Request, Sampling
from mhmoe_ray.serve.engine.scheduler import PIECE
from mhmoe_ray.serve.engine.torch_engine import BUDGET, TorchEngine, suit_to_cpu
from mhmoe_ray.spec import ServeSpec
from tests.paged import in_parts
from tests.serve.asking import together, tokens
from tests.serve.conftest import SEQ_LEN, SPEC, build_model
from tests.serve.own import answerer_of

GREEDY = Sampling(max_tokens=20, temperature=0)
KNOWN = 300


def engine_of(model, **more):
    suit_to_cpu(model, torch.float32)
    settings = {"concurrency": 32, "queue": 1000, "threads": 1, **more}
    return TorchEngine(model, torch.float32, frozenset(), KNOWN, settings.pop("seq_len", SEQ_LEN), **settings)


@pytest.fixture(scope="module")
def engine():
    """Yield an engine that never ends an answer before its limit."""
    engine = engine_of(build_model())
    yield engine
    engine.close()


def prompts(count, longest=SEQ_LEN - 20):
    g = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, longest + 1, (count,), generator=g).tolist()
    return [tuple(torch.randint(KNOWN, (n,), generator=g).tolist()) for n in lengths]


@torch.inference_mode()
def argmax_loop(model, ids, count, known=KNOWN, ends=()):
    """Return the greedy tokens, computed from the whole sequence at every step, without a cache."""
    ids, answer = list(ids), []
    for _ in range(count):
        token = int(model(torch.tensor([ids])).logits_BTV[0, -1, :known].argmax())
        if token in ends:
            break
        ids.append(token)
        answer.append(token)
    return answer


@torch.inference_mode()
@pytest.mark.parametrize("split", [1, 7, 19])
def test_logits_in_parts_are_those_of_the_whole(split):
    token_BT = torch.randint(SEQ_LEN, (2, 20), generator=torch.Generator().manual_seed(split))
    model = build_model().double()  # in float32, rounding alone makes 2e-5
    found = in_parts(model, token_BT, [split, *[1] * (20 - split)])
    torch.testing.assert_close(found, model(token_BT).logits_BTV, rtol=1e-6, atol=1e-6)


def mixed():
    """Return 32 requests, no two alike."""
    asked = []
    for i, ids in enumerate(prompts(32)):
        temperature = [0, 0.7, 1.5][i % 3]
        asked.append(
            Request(
                ids,
                Sampling(5 + i % 16, temperature, top_k=[0, 20][i % 2], top_p=[1, 0.9][i % 5 == 0], seed=i),
                logprobs=[None, 0, 3][i % 3],
                prompt_logprobs=i % 3 == 2,
            )
        )
    return asked


@pytest.mark.cpu
def test_32_mixed_answers_are_the_same_to_the_last_bit_alone_and_together(engine):
    asked = mixed()
    alone = [together(engine, [request])[0] for request in asked]
    before = engine.stats()
    assert together(engine, asked) == alone
    after = engine.stats()
    assert (after.step_tokens - before.step_tokens) / (after.steps - before.steps) > 8  # they were together
    model = build_model()
    for request, answer in zip(asked, alone, strict=True):
        assert len(answer.tokens) == request.sampling.max_tokens
        if request.sampling.temperature == 0:
            expected = argmax_loop(model, request.prompt_ids, request.sampling.max_tokens)
            assert [scored.token for scored in answer.tokens] == expected


@torch.inference_mode()
def test_logprobs_are_the_models_own(engine):
    """The scores are those before temperature and cuts.

    The tokens of the prompt have scores too, except the first one.
    """
    model = build_model()
    for ids in prompts(6):
        sampling = Sampling(8, temperature=0.8, top_k=5, seed=1, logit_bias={3: 2.0})
        [answer] = together(engine, [Request(ids, sampling, logprobs=4, prompt_logprobs=True)])
        scores = [*answer.prompt, *answer.tokens]
        whole = [scored.token for scored in scores]
        assert whole[: len(ids)] == list(ids)
        logprob_TV = model(torch.tensor([whole])).logits_BTV[0, :, :KNOWN].log_softmax(-1)
        assert scores[0].logprob is None
        for at, scored in enumerate(scores[1:]):
            assert scored.logprob == pytest.approx(float(logprob_TV[at, scored.token]), abs=1e-3)
            best = logprob_TV[at].topk(4)
            assert [lp for _, lp in scored.alternatives] == pytest.approx(best.values.tolist(), abs=1e-3)


def test_a_prompt_longer_than_a_steps_budget_is_answered_as_in_one_go():
    model, length = build_model(), BUDGET["cpu"] + 50
    engine = engine_of(model, seq_len=length + 20)
    ids = torch.randint(KNOWN, (length,), generator=torch.Generator().manual_seed(2)).tolist()
    try:
        assert tokens(engine, ids, GREEDY) == argmax_loop(build_model(), ids, 20)
        assert engine.stats().steps == 2 + 19
    finally:
        engine.close()


@pytest.mark.cpu
def test_a_prompt_that_begins_like_one_before_gives_the_same_bits_for_less():
    engine = engine_of(build_model(), seq_len=4 * PIECE)
    ids = tuple(torch.randint(KNOWN, (3 * PIECE,), generator=torch.Generator().manual_seed(4)).tolist())
    request = Request(ids, Sampling(10, temperature=0), logprobs=2)
    other = Request((*ids[: 2 * PIECE], 7, 8), Sampling(10, temperature=0), logprobs=2)
    try:
        first = together(engine, [request])
        assert engine.stats().reused_tokens == 0
        assert together(engine, [request]) == first
        assert engine.stats().reused_tokens == 2 * PIECE  # the last piece has the token that is computed in any case
        again = together(engine, [other])
        assert engine.stats().reused_tokens == 4 * PIECE
    finally:
        engine.close()
    fresh = engine_of(build_model(), seq_len=4 * PIECE)
    try:
        assert together(fresh, [other]) == again
    finally:
        fresh.close()


@pytest.mark.cpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_second_turn_gets_the_bits_of_an_engine_that_has_seen_nothing(tokenizer, precision):
    """The first turn's answer fills a piece up; where the second turn's prompt has that piece, it is computed as a
    whole."""
    spec, sampling = ServeSpec(precision=precision), Sampling(PIECE, temperature=0, logit_bias={0: -100.0})
    first = tuple(torch.randint(1, KNOWN, (PIECE + PIECE // 2,), generator=torch.Generator().manual_seed(6)).tolist())
    warm, fresh = (answerer_of(build_model(), tokenizer, 4 * PIECE, spec).engine for _ in range(2))
    try:
        [said] = together(warm, [Request(first, sampling)])
        turn = Request((*first, *(scored.token for scored in said.tokens), 5, 6), sampling, logprobs=2)
        assert together(warm, [turn]) == together(fresh, [turn])
        assert warm.stats().reused_tokens == PIECE  # the first turn's prompt, as far as it goes in whole pieces
    finally:
        warm.close()
        fresh.close()


def test_requests_wait_for_room_in_the_cache_and_all_are_answered():
    served, running = build_model(), []
    engine = engine_of(served, cache_tokens=2 * SEQ_LEN)
    served.register_forward_hook(lambda *_: running.append(engine.stats().running))
    asked = [Request(ids, GREEDY) for ids in prompts(12)]
    try:
        answers = together(engine, asked)
        stats = engine.stats()
    finally:
        engine.close()
    assert 1 < max(running) < 12
    model = build_model()
    for request, answer in zip(asked, answers, strict=True):
        assert [s.token for s in answer.tokens] == argmax_loop(model, request.prompt_ids, 20)
    assert (stats.running, stats.waiting, stats.cache_used, stats.requests) == (0, 0, 0, 12)


def test_experts_are_counted_for_real_tokens_only(engine):
    before = engine.stats()
    together(engine, [Request(prompts(1)[0], Sampling(5, temperature=0))])
    after = engine.stats()
    routes = torch.tensor(after.count_LE) - torch.tensor(before.count_LE)
    assert routes.shape == (1, SPEC.moe.experts)
    assert routes.sum() == (after.step_tokens - before.step_tokens) * SPEC.moe.heads * SPEC.moe.top_k


class Gate:
    """Gate that holds up a model's steps until it is opened."""

    def __init__(self, model):
        self.open, self.reached, self.steps = threading.Event(), threading.Event(), 0
        model.register_forward_pre_hook(self._hold)

    def _hold(self, *_):
        self.steps += 1
        self.reached.set()
        assert self.open.wait(60)


def test_a_request_too_many_is_refused_at_once():
    model = build_model()
    gate = Gate(model)
    engine = engine_of(model, concurrency=1, queue=2)

    async def crowd():
        tasks = [asyncio.create_task(anext(engine.generate(Request((1,), GREEDY))))]
        await asyncio.to_thread(gate.reached.wait, 60)
        tasks += [asyncio.create_task(anext(engine.generate(Request((1,), GREEDY)))) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(BusyError, match="2 requests wait already"):
            await anext(engine.generate(Request((1,), GREEDY)))
        assert engine.stats().waiting == 2
        gate.open.set()
        await asyncio.gather(*tasks)

    try:
        asyncio.run(crowd())
    finally:
        engine.close()


def test_requests_that_come_together_wait_only_once_all_places_are_taken():
    model = build_model()
    gate = Gate(model)
    engine = engine_of(model, concurrency=4, queue=1)

    async def crowd():
        tasks = [asyncio.create_task(anext(engine.generate(Request((1,), GREEDY))))]
        await asyncio.to_thread(gate.reached.wait, 60)
        tasks += [asyncio.create_task(anext(engine.generate(Request((1,), GREEDY)))) for _ in range(5)]
        await asyncio.sleep(0)
        gate.open.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    try:
        *answered, refused = asyncio.run(crowd())
    finally:
        engine.close()
    assert [len(update.tokens) for update in answered] == [1] * 5
    assert isinstance(refused, BusyError)


def test_clients_take_turns():
    """A client that asks for much does not keep another one waiting for all of it."""
    model = build_model()
    gate = Gate(model)
    engine = engine_of(model, concurrency=1)
    ended = []

    async def ask(client):
        async for update in engine.generate(Request((1, 2), Sampling(2, temperature=0), client=client)):
            if update.finish:
                ended.append(client)

    async def crowd():
        tasks = [asyncio.create_task(ask("many")) for _ in range(4)]
        await asyncio.to_thread(gate.reached.wait, 60)
        tasks += [asyncio.create_task(ask("few")) for _ in range(2)]
        await asyncio.sleep(0.01)
        gate.open.set()
        await asyncio.gather(*tasks)

    try:
        asyncio.run(crowd())
    finally:
        engine.close()
    assert ended == ["many", "many", "few", "many", "few", "many"]


def test_an_answer_that_nobody_wants_any_more_is_not_computed():
    model = build_model()
    engine = engine_of(model, seq_len=4000)
    steps = []
    model.register_forward_hook(lambda *_: steps.append(1))

    async def leave():
        async for _ in engine.generate(Request((1, 2), Sampling(3900, temperature=0))):
            if len(steps) > 4:
                break

    async def then_another():
        await leave()
        [_ async for _ in engine.generate(Request((1, 2), Sampling(3, temperature=0)))]

    try:
        asyncio.run(then_another())
        assert len(steps) < 2000  # of 3900
        assert engine.stats().running == 0
    finally:
        engine.close()


def test_an_engine_that_fails_says_so_to_all_and_to_those_who_come_later():
    model = build_model()

    def fail(*_):
        raise RuntimeError("out of something")

    model.register_forward_hook(fail)
    engine = engine_of(model)
    for _ in range(2):
        with pytest.raises(EngineError, match="RuntimeError: out of something"):
            together(engine, [Request((1,), GREEDY)] * 2)
    assert engine.why_broken == "RuntimeError: out of something"
    engine.close()


def test_a_request_that_cannot_be_computed_fails_alone():
    engine = engine_of(build_model())
    strange = Request((1,), Sampling(5, logit_bias={KNOWN + 7: 1.0}))  # which the API refuses

    async def beside():
        return await asyncio.gather(*(collected(r) for r in (strange, usual)), return_exceptions=True)

    async def collected(request):
        return [scored.token async for update in engine.generate(request) for scored in update.tokens]

    usual = Request((1, 2), GREEDY)
    failed, answer = asyncio.run(beside())
    assert isinstance(failed, EngineError)
    assert "IndexError" in str(failed)
    assert answer == argmax_loop(build_model(), (1, 2), 20)
    assert engine.why_broken is None
    assert engine.stats().running == 0
    engine.close()


@pytest.mark.parametrize("prompt", ["", "the quick", "日本 Jäger 🦊"])
def test_greedy_tokens_of_a_text_are_those_of_a_loop_without_cache(answerer, tokenizer, prompt):
    ids = answerer.encode(prompt)
    end = tokenizer.token_to_id(END_OF_TEXT)
    assert ids[0] == end
    assert tokenizer.decode(ids) == prompt
    expected = argmax_loop(build_model(), ids, 20, tokenizer.get_vocab_size(), {end})
    assert tokens(answerer.engine, ids, GREEDY) == expected


def test_only_tokens_with_text_are_drawn(answerer, tokenizer):
    """The model has rows for tokens that the tokenizer does not know."""
    asked = [Request(tuple(answerer.encode("")), Sampling(60, 2.0, seed=seed)) for seed in range(8)]
    drawn = {scored.token for answer in together(answerer.engine, asked) for scored in answer.tokens}
    assert max(drawn) < tokenizer.get_vocab_size() < SPEC.vocab_size


@pytest.mark.parametrize("backbone", ["llama", "subln"])
def test_in_bfloat16_scores_stay_near_those_of_float32(tokenizer, backbone):
    found, expected = (scores_of_a_prompt(backbone, precision, tokenizer) for precision in ("bfloat16", "float32"))
    for rough, exact in zip(found.prompt[1:], expected.prompt[1:], strict=True):
        assert rough.logprob == pytest.approx(exact.logprob, abs=0.2)
    assert found.prompt != expected.prompt


def scores_of_a_prompt(backbone, precision, tokenizer):
    model = build_model(SPEC.model_copy(update={"backbone": backbone}))
    answerer = answerer_of(model, tokenizer, SEQ_LEN, ServeSpec(precision=precision))
    ids = tuple(answerer.encode("the quick brown fox"))
    [answer] = together(answerer.engine, [Request(ids, Sampling(0), logprobs=0, prompt_logprobs=True)])
    answerer.engine.close()
    return answer


def test_seeds_give_other_answers(answerer):
    ids = tuple(answerer.encode("the"))
    asked = [Request(ids, Sampling(30, 1.5, top_p=0.95, seed=seed)) for seed in range(4)]
    found = together(answerer.engine, asked)
    assert len({tuple(s.token for s in answer.tokens) for answer in found}) == 4


def test_the_answer_ends_at_the_end_of_text(answerer, tokenizer):
    """The test swaps two tokens in the model and in the prompt, which must swap them in the answer and change nothing
    else."""
    ids = answerer.encode("the quick")
    whole = tokens(answerer.engine, ids, GREEDY)
    end, other = tokenizer.token_to_id(END_OF_TEXT), next(t for t in whole if t not in ids and t != whole[0])
    rename = {end: other, other: end}
    model = build_model()
    model.embedding.weight[[end, other]] = model.embedding.weight[[other, end]]
    renamed = answerer_of(model, tokenizer, SEQ_LEN, ServeSpec())
    request = Request(tuple(rename.get(t, t) for t in ids), GREEDY)
    [answer] = together(renamed.engine, [request])
    renamed.engine.close()
    before = whole[: whole.index(other)]
    assert before
    assert ([scored.token for scored in answer.tokens], answer.finish) == (before, "stop")
