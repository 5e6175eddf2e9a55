"""Every kind of layer in vLLM against the training model: greedy tokens, and log-probabilities within 1e-3."""

import pytest
import torch

from mhmoe_ray.serve.engine import Request, Sampling
from mhmoe_ray.spec import ModelSpec
from mhmoe_ray.spec.model import ROUTERS
from tests.serve.asking import together
from tests.serve.conftest import build_model, save
from tests.serve.test_torch_engine import KNOWN, argmax_loop, prompts
from tests.serve.vllm.conftest import SPEC, served


def changed(moe: dict, **trunk: object) -> ModelSpec:
    return ModelSpec.model_validate(SPEC.model_dump() | trunk | {"moe": SPEC.moe.model_dump() | moe})


KINDS = {
    "MH-MoE": SPEC,
    "SMoE": changed({"heads": 1}),
    "h = 4, k = 3, weights divided by their sum": changed(
        {"heads": 4, "top_k": 3, "experts": 8, "normalize_gates": True}, d_model=128, attention_heads=4
    ),
    "top-1": changed({"top_k": 1}),
    "grouped queries, own output layer": changed({}, kv_heads=1, tied_embeddings=False),
    "a shared expert and a residual around sub-tokens": changed({"d_shared": 40, "sub_token_residual": True}),
    "residual of SMoE": changed({"heads": 1, "sub_token_residual": True}),
    "projections of three layers": changed({"projection_layers": 3}),
    "no merge projection": changed({"merge_projection": False}),
    "experts in every layer": changed({"every": 1}, d_ff=None),
    "selection bias": changed({"bias_rate": 0.01}),
    "dense": ModelSpec.model_validate(SPEC.model_dump() | {"moe": None}),
    **{
        router: changed({"router": router, "router_dim": 3 if router == "xmoe" else None})
        for router in ROUTERS
        if router != "linear"
    },
}


def model_of(spec: ModelSpec):
    model = build_model(spec)
    for layer in model.moe_layers():
        if spec.moe.bias_rate:
            layer.router.bias_E.copy_(torch.tensor([0.3, -0.2, 0.1, 0.0]))
    return model


def largest_difference(model, answerer) -> float:
    """Return the largest difference of log-probabilities of prompts and answers between the model and vLLM.

    Greedy tokens are compared one by one where that difference is below 1e-3.
    """
    asked = [
        Request(ids, Sampling(20, temperature=0), logprobs=0, prompt_logprobs=True) for ids in prompts(8, longest=40)
    ]
    worst = 0.0
    for request, answer in zip(asked, together(answerer.engine, asked), strict=True):
        scores = [*answer.prompt, *answer.tokens]
        whole = [scored.token for scored in scores]
        with torch.inference_mode():
            logprob_TV = model(torch.tensor([whole])).logits_BTV[0, :, :KNOWN].log_softmax(-1)
        for at, scored in enumerate(scores[1:]):
            worst = max(worst, abs(scored.logprob - float(logprob_TV[at, scored.token])))
        if worst < 1e-3:
            assert whole[len(request.prompt_ids) :] == argmax_loop(model, request.prompt_ids, 20, ends={0})
    return worst


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_scores_are_those_of_the_training_model(run_dir, kind):
    model = model_of(KINDS[kind])
    with served(save(run_dir, 100 + list(KINDS).index(kind), model)) as answerer:
        assert largest_difference(model, answerer) < 1e-4


def test_weights_divided_by_their_sum_would_show(run_dir):
    """The comparison above is sharp: it shows the same weights in a model that differs in one option."""
    with served(save(run_dir, 201, build_model(SPEC))) as answerer:
        assert largest_difference(build_model(changed({"normalize_gates": True})), answerer) > 0.05


def test_sub_tokens_in_another_order_would_show(run_dir):
    """The wrong order has column i of a token in sub-token i % h instead of i // (d / h)."""
    model = build_model(SPEC)
    expected = build_model(SPEC)
    for layer in model.moe_layers():
        for projection in (layer.head.weight, layer.head.bias):
            projection.copy_(projection.unflatten(0, (-1, SPEC.moe.heads)).transpose(0, 1).flatten(0, 1).clone())
    with served(save(run_dir, 202, model)) as answerer:
        assert largest_difference(expected, answerer) > 0.05


def test_on_two_tensor_parallel_ranks(run_dir):
    model = model_of(KINDS["a shared expert and a residual around sub-tokens"])
    with served(save(run_dir, 203, model), tensor_parallel=2, cpus_per_replica=2) as answerer:
        assert largest_difference(model, answerer) < 1e-4
