"""Prompts and requests for engines, and answers computed without an engine."""

import torch

from mhmoe_ray.serving.engine import Request, SamplingParams
from tests.serving.conftest import SEQ_LEN

TOKENIZER_SIZE = 300


def random_prompts(count, max_length=SEQ_LEN - 20):
    """Return prompts of 1 to `max_length` random tokens, the same at each call."""
    g = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, max_length + 1, (count,), generator=g).tolist()
    return [tuple(torch.randint(TOKENIZER_SIZE, (n,), generator=g).tolist()) for n in lengths]


@torch.inference_mode()
def greedy_tokens(model, ids, count, tokenizer_size=TOKENIZER_SIZE, end_tokens=()):
    """Return up to `count` greedy tokens before the first end token, computed from the whole sequence at every step."""
    ids, answer = list(ids), []
    for _ in range(count):
        token = int(model(torch.tensor([ids])).logits_BTV[0, -1, :tokenizer_size].argmax())
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
