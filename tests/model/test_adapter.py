"""Tests of low-rank adapters in a model: they add B A to their matrices, and freeze everything else."""

import pytest
import torch
from pydantic import ValidationError

from mhmoe_ray.model.adapter import add_adapters, is_adapter, matrix_sums
from mhmoe_ray.model.build import build_model
from mhmoe_ray.model.init import init_weights
from mhmoe_ray.spec import ModelSpec, RunSpec
from mhmoe_ray.spec.adapter import AdapterSpec, target_widths
from tests.support.specs import tiny_spec

SIZES = {"vocab_size": 300, "d_model": 32, "layers": 2, "attention_heads": 4, "kv_heads": 2}
EXPERTS = {"heads": 1, "experts": 4, "top_k": 2, "d_expert": 24, "every": 1}
MODELS = {
    "dense": {**SIZES, "d_ff": 48, "moe": None},
    "mixtral": {**SIZES, "moe": {**EXPERTS, "normalize_gates": True}, "tied_embeddings": False},
    "olmoe": {**SIZES, "qk_norm": "all", "moe": EXPERTS},
    "multi-head": {**SIZES, "d_ff": 48, "moe": {**EXPERTS, "heads": 2, "every": 2, "d_shared": 16}},
    "projected": {**SIZES, "moe": {**EXPERTS, "heads": 2, "projection_layers": 3}},
    "subln": {"vocab_size": 300, "d_model": 32, "layers": 2, "attention_heads": 4, "backbone": "subln", "d_ff": 48,
              "moe": {**EXPERTS, "heads": 2, "every": 2}},
}  # fmt: skip
TOKENS = torch.randint(300, (2, 16), generator=torch.Generator().manual_seed(0))


def adapted_model(spec: ModelSpec, adapter: AdapterSpec) -> torch.nn.Module:
    """Return a model with an adapter, whose B are random instead of zero."""
    with torch.device("meta"):
        model = build_model(spec)
        add_adapters(model, adapter)
    init_weights(model.to_empty(device="cpu"), 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.trained_parameters().items():
            if ".lora_b" in name:
                parameter.normal_(std=0.1, generator=generator)
    return model


def merged_model(model: torch.nn.Module) -> torch.nn.Module:
    """Return a model whose weights are the sums of those of a model and its adapter."""
    merged, tensors = build_model(model.spec), {n: t.detach() for n, t in model.named_parameters()}
    merged.load_state_dict({name: t for name, t in model.state_dict().items() if not is_adapter(name)})
    for name, matrix_sum in matrix_sums(model):
        matrix_sum.add_to(merged.get_parameter(name).detach(), tensors[matrix_sum.a_name], tensors[matrix_sum.b_name])
    return merged


CASES = [(name, target) for name, tree in MODELS.items() for target in target_widths(ModelSpec.model_validate(tree))]


@pytest.mark.parametrize(("name", "target"), CASES)
def test_logits_are_those_of_merged_weights_and_only_the_adapter_has_gradients(name, target):
    spec = ModelSpec.model_validate(MODELS[name])
    model = adapted_model(spec, AdapterSpec(rank=4, alpha=6, targets=[target]))
    logits = model(TOKENS).logits_BTV
    torch.testing.assert_close(logits, merged_model(model)(TOKENS).logits_BTV, atol=2e-5, rtol=0)
    plain = build_model(spec)
    plain.load_state_dict({n: t for n, t in model.state_dict().items() if not is_adapter(n)})
    assert (logits - plain(TOKENS).logits_BTV).abs().max() > 1e-3
    logits.square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(model.trained_parameters())
    assert all(map(is_adapter, model.trained_parameters()))


def test_a_new_adapter_changes_nothing():
    spec = ModelSpec.model_validate(MODELS["multi-head"])
    model = build_model(spec)
    add_adapters(model, AdapterSpec(rank=4))
    init_weights(model, 0)
    plain = build_model(spec)
    init_weights(plain, 0)
    torch.testing.assert_close(model(TOKENS).logits_BTV, plain(TOKENS).logits_BTV, atol=1e-6, rtol=0)


def test_the_adapter_of_an_expert_changes_its_outputs_only():
    spec = ModelSpec.model_validate({**MODELS["mixtral"], "layers": 1})
    model = adapted_model(spec, AdapterSpec(rank=4, targets=["experts"]))
    output = model(TOKENS)
    with torch.no_grad():
        model.blocks[0].moe.experts.lora_b_down_EDZ[2] += 1.0
    changed_N = (model(TOKENS).logits_BTV - output.logits_BTV).abs().amax(-1).flatten() > 0
    assert torch.equal(changed_N, (output.routing[0].expert_NK == 2).any(1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 33}, "rank is 33, above the width 32 of query"),
        ({"targets": ["feed_forward"]}, "targets has feed_forward, which the model lacks: choose from query, key"),
        ({"targets": ["experts"], "dropout": 0.1}, "dropout is 0.1, but none of experts has dropout"),
        ({"base_precision": "bfloat16"}, "base_precision bfloat16 would round"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(changes, message):
    moe = {**MODELS["mixtral"]["moe"], "d_expert": 64}
    tree = tiny_spec().model_dump(by_alias=True, mode="json")
    tree |= {"start": {"from": "base"}, "model": {**MODELS["mixtral"], "moe": moe}}
    tree["train"]["adapter"] = {"targets": ["query"]} | changes
    with pytest.raises(ValidationError, match=message):
        RunSpec.model_validate(tree)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": None}, "name it in start.from"),
        ({"cluster": {"strategy": "zero1"}}, "strategies ddp, fsdp and hybrid"),
        ({"start": {"from": "base", "optimizer": True}}, "has no earlier moments"),
    ],
)
def test_an_adapter_needs_a_base_and_a_strategy(changes, message):
    tree = tiny_spec().model_dump(by_alias=True, mode="json") | {"start": {"from": "base"}} | changes
    tree["train"]["adapter"] = {}
    with pytest.raises(ValidationError, match=message):
        RunSpec.model_validate(tree)
