"""Tests of each kind of layer in vLLM against the training model: greedy tokens, and log-probabilities within 1e-4."""

import pytest
import torch

from mhmoe_ray.model.router import SCORES_BY_ROUTER
from mhmoe_ray.serving.engine import Request, SamplingParams
from mhmoe_ray.spec import ModelSpec
from tests.serving.asking import answer_all
from tests.serving.conftest import build_model, save_checkpoint
from tests.serving.prompts import TOKENIZER_SIZE, greedy_tokens, random_prompts
from tests.serving.vllm.conftest import SPEC, serve_with_vllm


def changed_spec(moe: dict, **trunk: object) -> ModelSpec:
    """Return `SPEC` with the keys of `moe` replaced in its MoE layers, and those of `trunk` in the rest of it."""
    return ModelSpec.model_validate(SPEC.model_dump() | trunk | {"moe": SPEC.moe.model_dump() | moe})


KINDS = {
    "MH-MoE": SPEC,
    "SMoE": changed_spec({"heads": 1}),
    "h = 4, k = 3, weights divided by their sum": changed_spec(
        {"heads": 4, "top_k": 3, "experts": 8, "normalize_gates": True}, d_model=128, attention_heads=4
    ),
    "top-1": changed_spec({"top_k": 1}),
    "grouped queries, own output layer": changed_spec({}, kv_heads=1, tied_embeddings=False),
    "a shared expert and a residual around sub-tokens": changed_spec({"d_shared": 40, "sub_token_residual": True}),
    "residual of SMoE": changed_spec({"heads": 1, "sub_token_residual": True}),
    "projections of three layers": changed_spec({"projection_layers": 3}),
    "sub-tokens as wide as tokens": changed_spec({"d_sub_token": 64}),
    "sub-tokens of another width, projections of two layers": changed_spec(
        {"heads": 3, "d_sub_token": 32, "projection_layers": 2, "d_shared": 40, "sub_token_residual": True}
    ),
    "no merge projection": changed_spec({"merge_projection": False}),
    "experts in every layer": changed_spec({"every": 1}, d_ff=None),
    "selection bias": changed_spec({"bias_rate": 0.01}),
    "dense": ModelSpec.model_validate(SPEC.model_dump() | {"moe": None}),
    "everything that the trunk and the routers of other architectures have": changed_spec(
        {
            "experts": 8,
            "every": 1,
            "dense_first": 1,
            "scoring": "sigmoid",
            "normalize_gates": True,
            "gate_scale": 2.5,
            "groups": 4,
            "top_groups": 2,
        },
        d_head=64,
        qk_norm="head",
        attention_bias="qkv",
        rope_scaling={"type": "yarn", "factor": 4, "original_length": 32},
    ),
    "norm of all queries, all biases": changed_spec(
        {},
        qk_norm="all",
        attention_bias="all",
        rope_scaling={"type": "llama3", "factor": 8, "original_length": 32},
    ),
    **{
        router: changed_spec({"router": router, "router_dim": 3 if router == "xmoe" else None})
        for router in SCORES_BY_ROUTER
        if router != "linear"
    },
}


def build_biased_model(spec: ModelSpec):
    """Return a model with fixed weights; if it has a selection bias, the biases are not zero."""
    model = build_model(spec)
    for layer in model.moe_layers():
        if spec.moe.bias_rate:
            layer.router.bias_E.copy_(torch.tensor([0.3, -0.2, 0.1, 0.0]))
    return model


def largest_difference(model, answerer) -> float:
    """Return the largest difference between log-probabilities of the model and of vLLM, over prompts and answers.

    If that difference is below 1e-3, assert that the greedy tokens are equal, too.
    """
    requests = [
        Request(ids, SamplingParams(max_tokens=20, temperature=0, logprobs=0), prompt_logprobs=True)
        for ids in random_prompts(8, max_length=40)
    ]
    worst = 0.0
    for request, answer in zip(requests, answer_all(answerer.engine, requests), strict=True):
        scores = [*answer.prompt_scores, *answer.tokens]
        token_ids = [scored.token for scored in scores]
        with torch.inference_mode():
            logprob_TV = model(torch.tensor([token_ids])).logits_BTV[0, :, :TOKENIZER_SIZE].log_softmax(-1)
        for i, scored in enumerate(scores[1:]):
            worst = max(worst, abs(scored.logprob - float(logprob_TV[i, scored.token])))
        if worst < 1e-3:
            assert token_ids[len(request.prompt_ids) :] == greedy_tokens(model, request.prompt_ids, 20, end_tokens={0})
    return worst


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_scores_equal_those_of_the_training_model(run_dir, kind):
    model = build_biased_model(KINDS[kind])
    with serve_with_vllm(save_checkpoint(run_dir, 100 + list(KINDS).index(kind), model)) as answerer:
        assert largest_difference(model, answerer) < 1e-4


def test_wrong_gate_normalization_is_detected(run_dir):
    """The comparison with vLLM detects a model with the same weights whose gates are normalized otherwise."""
    with serve_with_vllm(save_checkpoint(run_dir, 201, build_model(SPEC))) as answerer:
        assert largest_difference(build_model(changed_spec({"normalize_gates": True})), answerer) > 0.05


def test_wrong_sub_token_order_is_detected(run_dir):
    """The comparison with vLLM detects a model that splits tokens into sub-tokens in another order.

    The wrong order puts column i of a token into sub-token i % h instead of i // (d / h).
    """
    model = build_model(SPEC)
    expected = build_model(SPEC)
    for layer in model.moe_layers():
        for projection in (layer.head.weight, layer.head.bias):
            projection.copy_(projection.unflatten(0, (-1, SPEC.moe.heads)).transpose(0, 1).flatten(0, 1).clone())
    with serve_with_vllm(save_checkpoint(run_dir, 202, model)) as answerer:
        assert largest_difference(expected, answerer) > 0.05


def test_two_tensor_parallel_ranks_equal_the_training_model(run_dir):
    model = build_biased_model(KINDS["a shared expert and a residual around sub-tokens"])
    with serve_with_vllm(save_checkpoint(run_dir, 203, model), tensor_parallel=2, cpus_per_replica=2) as answerer:
        assert largest_difference(model, answerer) < 1e-4
