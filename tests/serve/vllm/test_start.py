"""Engines that are started for a single test.

A process has one vLLM at a time, as a replica has.
"""

import asyncio

import pytest
import torch

from mhmoe_ray.serve.engine import BusyError, EngineError, Request, Sampling
from mhmoe_ray.serve.load import load_answerer
from mhmoe_ray.spec import ServeSpec
from tests.serve.asking import together, tokens
from tests.serve.conftest import build_model, save, save_spread
from tests.serve.test_torch_engine import KNOWN, argmax_loop, prompts
from tests.watch import wait_until

from .conftest import SPEC, greedy_of_32, served


@pytest.fixture(scope="module")
def checkpoint(run_dir):
    return save(run_dir, 320, build_model(SPEC))


@pytest.fixture(scope="module")
def spread(run_dir):
    return save_spread(run_dir, 321, SPEC)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_checkpoint_of_two_expert_parallel_ranks_gives_the_same_tokens(spread, ranks):
    with served(spread, tensor_parallel=ranks, cpus_per_replica=ranks) as answerer:
        found = greedy_of_32(answerer.engine)
    own = load_answerer(spread, ServeSpec())
    assert found == greedy_of_32(own.engine)
    own.engine.close()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_experts_of_two_gpus_give_the_same_tokens(spread):
    with served(spread, tensor_parallel=2, gpus_per_replica=2, expert_parallel=True) as answerer:
        found = greedy_of_32(answerer.engine)
    assert found == [argmax_loop(build_model(SPEC), ids, 20, ends={0}) for ids in prompts(32)]


def test_a_request_too_many_is_refused_and_clients_take_turns(checkpoint):
    ended = []

    async def ask(engine, client, most=4):
        async for update in engine.generate(Request((1, 2), Sampling(most, temperature=0), client=client)):
            if update.finish:
                ended.append(client)

    async def crowd(engine):
        tasks = [asyncio.create_task(ask(engine, "first", 40))]
        while not engine.stats().running:
            await asyncio.sleep(0.001)
        for client in ("many", "many", "many", "few"):
            tasks.append(asyncio.create_task(ask(engine, client)))
            await asyncio.sleep(0)
        with pytest.raises(BusyError, match="4 requests wait already"):
            await ask(engine, "more")
        await asyncio.gather(*tasks)

    with served(checkpoint, max_concurrency=1, max_waiting=4) as answerer:
        asyncio.run(crowd(answerer.engine))
    assert ended == ["first", "many", "few", "many", "many"]


def test_an_engine_that_nobody_has_asked_has_counted_nothing(checkpoint):
    with served(checkpoint) as answerer:
        counted = wait_until(lambda: answerer.engine.stats().count_LE, "the experts' counts")
    assert counted == [[0] * SPEC.moe.experts] * len(counted)


def test_an_engine_that_is_closed_says_so(checkpoint):
    with served(checkpoint) as answerer:
        pass
    with pytest.raises(EngineError, match="closed"):
        tokens(answerer.engine, (1,), Sampling(20, temperature=0))


def test_in_bfloat16_scores_stay_near_those_of_the_training_model(checkpoint):
    """Routing is in float32 in vLLM too, so that few rows go to other experts."""
    ids = prompts(1)[0]
    request = Request(ids, Sampling(0), logprobs=0, prompt_logprobs=True)
    with served(checkpoint, precision="bfloat16") as answerer:
        [answer] = together(answerer.engine, [request])
    with torch.inference_mode():
        logprob_TV = build_model(SPEC)(torch.tensor([ids])).logits_BTV[0, :, :KNOWN].log_softmax(-1)
    found = torch.tensor([scored.logprob for scored in answer.prompt[1:]])
    expected = logprob_TV[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert (found - expected).abs().mean() < 0.1
    assert not torch.equal(found, expected)
