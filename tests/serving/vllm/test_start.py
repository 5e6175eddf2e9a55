"""Tests that each start a vLLM engine of their own, because a process can have only one such engine at a time."""

import asyncio

import pytest
import torch

from mhmoe_ray.serving.engine import BusyError, EngineError, Request, SamplingParams
from mhmoe_ray.serving.load import load_answerer
from mhmoe_ray.spec import ServeSpec
from tests.serving.asking import answer_all, answer_tokens
from tests.serving.conftest import build_model, save_checkpoint, save_expert_parallel
from tests.serving.prompts import TOKENIZER_SIZE, greedy_tokens, random_prompts
from tests.support.watch import wait_until

from .conftest import SPEC, greedy_answers, serve_with_vllm


@pytest.fixture(scope="module")
def checkpoint(run_dir):
    return save_checkpoint(run_dir, 320, build_model(SPEC))


@pytest.fixture(scope="module")
def expert_parallel_checkpoint(run_dir):
    return save_expert_parallel(run_dir, 321, SPEC)


@pytest.mark.parametrize("ranks", [1, 2])
def test_expert_parallel_checkpoint_gives_the_same_tokens(expert_parallel_checkpoint, ranks):
    with serve_with_vllm(expert_parallel_checkpoint, tensor_parallel=ranks, cpus_per_replica=ranks) as answerer:
        answers = greedy_answers(answerer.engine)
    own_answerer = load_answerer(expert_parallel_checkpoint, ServeSpec())
    assert answers == greedy_answers(own_answerer.engine)
    own_answerer.engine.close()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_experts_on_two_gpus_give_the_same_tokens(expert_parallel_checkpoint):
    with serve_with_vllm(
        expert_parallel_checkpoint, tensor_parallel=2, gpus_per_replica=2, expert_parallel=True
    ) as answerer:
        answers = greedy_answers(answerer.engine)
    assert answers == [greedy_tokens(build_model(SPEC), ids, 20, end_tokens={0}) for ids in random_prompts(32)]


def test_clients_take_turns_and_the_queue_is_limited(checkpoint):
    finished_clients = []

    async def ask(engine, client, max_tokens=4):
        async for update in engine.generate(
            Request((1, 2), SamplingParams(max_tokens=max_tokens, temperature=0), client=client)
        ):
            if update.finish_reason:
                finished_clients.append(client)

    async def send_requests(engine):
        tasks = [asyncio.create_task(ask(engine, "first", 40))]
        while not engine.stats().running:
            await asyncio.sleep(0.001)
        for client in ("many", "many", "many", "few"):
            tasks.append(asyncio.create_task(ask(engine, client)))
            await asyncio.sleep(0)
        with pytest.raises(BusyError, match="4 requests wait already"):
            await ask(engine, "more")
        await asyncio.gather(*tasks)

    with serve_with_vllm(checkpoint, max_concurrency=1, max_waiting=4) as answerer:
        asyncio.run(send_requests(answerer.engine))
    assert "few" in finished_clients[:2]
    assert finished_clients[-1] == "first", "the long request pauses meanwhile"


def test_idle_engine_has_no_expert_counts(checkpoint):
    with serve_with_vllm(checkpoint) as answerer:
        count_LE = wait_until(lambda: answerer.engine.stats().count_LE, "the experts' counts")
    assert count_LE == [[0] * SPEC.moe.experts] * len(count_LE)


def test_closed_engine_refuses_requests(checkpoint):
    with serve_with_vllm(checkpoint) as answerer:
        pass
    with pytest.raises(EngineError, match="closed"):
        answer_tokens(answerer.engine, (1,), SamplingParams(max_tokens=20, temperature=0))


def test_bfloat16_scores_are_close_to_the_training_model(checkpoint):
    """Scores in bfloat16 differ by less than 0.1 on average: with routing in float32, few sub-tokens change experts."""
    ids = random_prompts(1)[0]
    request = Request(ids, SamplingParams.model_construct(max_tokens=0, logprobs=0), prompt_logprobs=True)
    with serve_with_vllm(checkpoint, precision="bfloat16") as answerer:
        [answer] = answer_all(answerer.engine, [request])
    with torch.inference_mode():
        logprob_TV = build_model(SPEC)(torch.tensor([ids])).logits_BTV[0, :, :TOKENIZER_SIZE].log_softmax(-1)
    scores = torch.tensor([scored.logprob for scored in answer.prompt_scores[1:]])
    expected = logprob_TV[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert (scores - expected).abs().mean() < 0.1
    assert not torch.equal(scores, expected)
