"""Prompts and requests for engines, and answers computed without an engine."""

import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from mhmoe_ray.serving.engine import Request, SamplingParams
from tests.serving.asking import answer_all
from tests.serving.conftest import SEQ_LEN

TOKENIZER_SIZE = 300


def random_prompts(count, max_length=SEQ_LEN - 20):
    """Return prompts of 1 to `max_length` random tokens, the same at each call."""
    g = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, max_length + 1, (count,), generator=g).tolist()
    return [tuple(torch.randint(TOKENIZER_SIZE, (n,), generator=g).tolist()) for n in lengths]


@torch.inference_mode()
def greedy_tokens(model, ids, count, tokenizer_size=TOKENIZER_SIZE, end_tokens=(), processor=None):
    """Return up to `count` greedy tokens before the first end token, computed from the whole sequence at every step.

    `processor` is a logits processor of transformers.
    """
    ids, answer = list(ids), []
    for _ in range(count):
        token_BT = torch.tensor([ids])
        logits_BV = model(token_BT).logits_BTV[:, -1, :tokenizer_size]
        token = int((processor(token_BT, logits_BV) if processor else logits_BV).argmax())
        if token in end_tokens:
            break
        ids.append(token)
        answer.append(token)
    return answer


def mixed_requests():
    """Return 32 requests with different prompts, sampling parameters and requested scores."""
    requests = []
    for i, ids in enumerate(random_prompts(32)):
        temperature = [0, 0.7, 1.5][i % 3]
        requests.append(
            Request(
                ids,
                SamplingParams(
                    max_tokens=5 + i % 16,
                    temperature=temperature,
                    top_k=[0, 20][i % 2],
                    top_p=[1, 0.9][i % 5 == 0],
                    seed=i,
                    logprobs=[None, 0, 3][i % 3],
                ),
                prompt_logprobs=i % 3 == 2,
            )
        )
    return requests


def check_processed_answers(engine, model, end_token):
    """Check that answers equal those of logits processors of transformers: penalty, smallest length, ignored end."""
    penalty, smallest_length = 1.4, 6
    likely_end = {"max_tokens": 12, "temperature": 0, "logit_bias": {end_token: 100.0}}
    for ids in random_prompts(4):
        cases = [
            (
                # Whether an end token is among the likely ones depends on the random weights.
                SamplingParams(max_tokens=12, temperature=0, repetition_penalty=penalty, ignore_eos=True),
                RepetitionPenaltyLogitsProcessor(penalty),
                "length",
            ),
            (
                SamplingParams(min_tokens=smallest_length, **likely_end),
                LogitsProcessorList(
                    [
                        SequenceBiasLogitsProcessor({(end_token,): 100.0}),
                        MinNewTokensLengthLogitsProcessor(len(ids), smallest_length, end_token),
                    ]
                ),
                "stop",
            ),
            (
                SamplingParams(min_tokens=smallest_length, ignore_eos=True, **likely_end),
                SequenceBiasLogitsProcessor({(end_token,): 100.0}),
                "length",
            ),
        ]
        answers = answer_all(engine, [Request(ids, sampling) for sampling, _, _ in cases])
        for (sampling, processor, finish_reason), answer in zip(cases, answers, strict=True):
            end_tokens = () if sampling.ignore_eos else (end_token,)
            expected = greedy_tokens(model, ids, 12, end_tokens=end_tokens, processor=processor)
            assert ([scored.token for scored in answer.tokens], answer.finish_reason) == (expected, finish_reason)
        assert [len(answer.tokens) for answer in answers] == [12, smallest_length, 12]
