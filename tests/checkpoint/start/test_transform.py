"""Tests of the first weights of runs that start from other models."""

import copy

import pytest
import torch

from mhmoe_ray.checkpoint.start.compatibility import check_start
from mhmoe_ray.checkpoint.start.transform import StartTransform
from mhmoe_ray.errors import SpecError
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.spec import ModelSpec, MoESpec, StartSpec
from tests.checkpoint.huggingface.conftest import DENSE, MIXTRAL, random_model
from tests.checkpoint.start.models import start_model
from tests.support.specs import tiny_spec

TOKENS = torch.randint(320, (2, 40), generator=torch.Generator().manual_seed(0))


def transformed(spec: ModelSpec, sources: list[Decoder], new_experts: dict[str, str] | None = None) -> Decoder:
    """Return a model of a spec whose weights are made from those of other models."""
    with torch.device("meta"):
        transform = StartTransform(Decoder(spec), Decoder(sources[0].spec), 0, new_experts)
    model = Decoder(spec).requires_grad_(False).eval()
    source_tensors = [source.named_tensors() for source in sources]
    for name, tensor in model.named_tensors().items():
        source_name = transform.source_name(name)
        tensors = [tensors[source_name] for tensors in source_tensors] if source_name else []
        tensor.copy_(transform.tensor(name, tensors))
    return model


def upcycled(dense: ModelSpec, **moe) -> ModelSpec:
    spec = dense.with_moe(MoESpec(**moe))
    check_start(StartSpec(**{"from": "run", "how": "upcycle"}), spec, [start_model(dense)])
    return spec


@pytest.mark.parametrize("backbone", ["llama", "subln"])
@pytest.mark.parametrize(
    "moe",
    [
        {"heads": 1, "d_expert": 48, "normalize_gates": True},
        {"heads": 1, "d_expert": 48, "normalize_gates": True, "experts": 6, "top_k": 3, "every": 1},
        {"heads": 4, "d_expert": 24, "d_shared": 48},
        {"heads": 2, "d_expert": 24, "d_shared": 48, "projection_layers": 3, "sub_token_residual": True, "every": 1},
        {"heads": 1, "d_expert": 24, "d_shared": 48, "head_projection": True, "merge_projection": True},
        {"heads": 2, "d_expert": 24, "d_shared": 48, "router": "xmoe", "bias_rate": 0.1},
    ],
)
def test_an_upcycled_model_computes_what_its_dense_start_computes(backbone, moe):
    dense = random_model(ModelSpec(**DENSE, backbone=backbone))
    model = transformed(upcycled(dense.spec, **moe), [dense])
    expected = dense(TOKENS).logits_BTV
    torch.testing.assert_close(model(TOKENS).logits_BTV, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("heads", [2, 3])
@pytest.mark.parametrize(
    "start",
    [
        MIXTRAL.model_copy(update={"document_masks": False}),
        ModelSpec(**DENSE, moe=MoESpec(heads=1, d_expert=24, d_shared=16, router="xmoe", bias_rate=0.1)),
        ModelSpec(**DENSE, backbone="subln", moe=MoESpec(heads=1, d_expert=24, router="xmoe_torchscale")),
    ],
)
def test_an_upcycled_mixture_computes_what_its_start_computes(start, heads):
    """The first sub-token equals the token and goes to the old experts; later training can use the other sub-tokens."""
    assert start.moe is not None
    moe = start.moe.model_copy(update={"heads": heads, "d_sub_token": start.d_model})
    spec = start.model_copy(update={"moe": moe})
    check_start(StartSpec(**{"from": "run", "how": "upcycle"}), spec, [start_model(start)])
    mixture = random_model(start)
    model = transformed(spec, [mixture])
    torch.testing.assert_close(model(TOKENS).logits_BTV, mixture(TOKENS).logits_BTV, rtol=0, atol=1e-5)
    model.requires_grad_(True)
    model(TOKENS[:, :-1]).logits_BTV.logsumexp(-1).sum().backward()
    merge_gradient = model.moe_layers()[0].merge.weight.grad
    assert merge_gradient[:, start.d_model :].abs().max() > 0, "the other sub-tokens have no effect that can be learned"


def test_experts_of_an_upcycled_mh_moe_layer_differ_and_get_gradients_after_one_step():
    """The merge projection is zero, so the experts get gradients only after its first update."""
    dense = random_model(ModelSpec(**DENSE))
    model = transformed(upcycled(dense.spec, heads=2, d_expert=24, d_shared=48), [dense]).requires_grad_(True)
    experts = model.moe_layers()[0].experts.gate_EFD
    assert not torch.equal(experts[0], experts[1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradients = []
    for _ in range(2):
        optimizer.zero_grad()
        model(TOKENS[:, :-1]).logits_BTV.logsumexp(-1).sum().backward()
        gradients.append(experts.grad.abs().max().item())
        optimizer.step()
    assert gradients[0] == 0 < gradients[1]


def test_a_mix_has_the_experts_of_its_models_and_the_mean_of_everything_else():
    dense = ModelSpec(**DENSE)
    models = [random_model(dense), random_model(dense), random_model(dense)]
    for i, model in enumerate(models):
        for tensor in model.named_tensors().values():
            tensor.mul_(1 + i)
    spec = dense.with_moe(MoESpec(heads=1, experts=3, d_expert=48, normalize_gates=True))
    check_start(StartSpec(**{"from": ["a", "b", "c"], "how": "mix"}), spec, [start_model(dense)] * 3)
    mixed = transformed(spec, models)
    sources, tensors = [model.named_tensors() for model in models], mixed.named_tensors()
    for name, tensor in tensors.items():
        if ".moe.experts." in name:
            matrix = name.replace(".moe.experts.", ".ffn.").replace("_E", "_")
            assert torch.equal(tensor, torch.stack([source[matrix] for source in sources]))
        elif ".moe.router." not in name:
            mean = sum(source[name].double() for source in sources) / 3
            assert torch.equal(tensor, mean.float())


def test_mixing_copies_of_a_model_equals_upcycling_it():
    dense = random_model(ModelSpec(**DENSE))
    spec = upcycled(dense.spec, heads=1, experts=3, d_expert=48, normalize_gates=True)
    mixed, copied = (transformed(spec, [dense] * n).named_tensors() for n in (3, 1))
    assert all(torch.equal(mixed[name], copied[name]) for name in copied)


@pytest.mark.parametrize(
    ("start_kind", "model", "message"),
    [
        ("copy", {"d_model": 64}, "model.d_model is 64 here and 32 there"),
        ("copy", {"vocab_size": 400}, "model.vocab_size is 400 here and 320 there"),
        ("copy", {"attention_heads": 8}, "model.attention_heads is 8 here and 4 there"),
        ("copy", {"moe": {"d_expert": 24}}, "model.moe is a section here and not set there"),
        ("upcycle", {}, "model.moe is missing"),
        ("upcycle", {"layers": 3, "moe": {"d_expert": 24, "d_shared": 48}}, "model.layers is 3 here and 2 there"),
        ("upcycle", {"moe": {"d_expert": 24}}, "model.moe.d_shared is 0, and the dense layers there have width 48"),
        ("upcycle", {"moe": {"heads": 1, "d_expert": 48}}, "model.moe.normalize_gates is False"),
        ("upcycle", {"moe": {"heads": 1, "d_expert": 24, "normalize_gates": True}}, "model.moe.d_expert is 24"),
        ("upcycle", {"moe": {"d_expert": 24, "d_shared": 48, "merge_projection": False}}, "merge_projection is false"),
        ("copy-mixture", {"moe": {"heads": 2, "d_expert": 24}}, "model.moe.heads is 2 here and 1 there"),
        ("upcycle-mixture", {"moe": {"heads": 1, "d_expert": 24}}, "it is a mixture of experts already"),
        ("upcycle-mixture", {"moe": {"heads": 2, "d_expert": 24}}, "d_sub_token is 16, and the experts there take"),
        ("upcycle-mixture", {"moe": {"d_sub_token": 32, "d_expert": 16}}, "model.moe.d_expert is 16 here and 24 there"),
        ("mix-mixture", {"moe": {"heads": 1, "experts": 2, "d_expert": 48}}, "only dense models can be mixed"),
        ("mix", {"moe": {"heads": 1, "experts": 4, "d_expert": 48, "normalize_gates": True}}, "experts is 4"),
        ("mix", {"moe": {"heads": 2, "experts": 2, "d_expert": 48, "normalize_gates": True}}, "on whole tokens"),
    ],
)
def test_a_start_with_another_shape_or_function_is_refused_by_name(start_kind, model, message):
    start_method, _, is_mixture = start_kind.partition("-")
    sources = ["a", "b"] if start_method == "mix" else ["a"]
    spec = ModelSpec.model_validate({**DENSE, **model})
    start = ModelSpec(**DENSE, moe=MoESpec(heads=1, d_expert=24) if is_mixture else None)
    with pytest.raises(SpecError) as error:
        check_start(StartSpec(**{"from": sources, "how": start_method}), spec, [start_model(start)] * len(sources))
    assert message in str(error.value)


def test_models_with_different_trunks_are_not_mixed():
    models = [start_model(ModelSpec(**DENSE)), start_model(ModelSpec(**{**DENSE, "kv_heads": 2}))]
    spec = ModelSpec(**DENSE).with_moe(MoESpec(heads=1, experts=2, d_expert=48, normalize_gates=True))
    with pytest.raises(SpecError, match=r"have different models: model\.kv_heads is 2"):
        check_start(StartSpec(**{"from": ["a", "b"], "how": "mix"}), spec, models)


def test_options_of_training_and_positions_may_differ():
    spec = ModelSpec(**DENSE)
    changed = spec.model_copy(update={"dropout": 0.1, "document_masks": True, "rope_theta": 1e6})
    check_start(StartSpec(**{"from": "run"}), changed, [start_model(spec)])


def test_experts_of_domains_are_added_removed_and_reordered_by_name():
    moe = {"router": "domain", "top_k": 1, "heads": 1, "d_expert": 48}
    old_model = random_model(ModelSpec(**DENSE, moe=MoESpec(**moe, experts=3, domains=["a", "b", "c"])))
    spec = ModelSpec(**DENSE, moe=MoESpec(**moe, experts=4, domains=["c", "new", "mean", "a"]))
    start = StartSpec(**{"from": "run", "new_experts": {"new": "b"}})
    check_start(start, spec, [start_model(old_model.spec)])
    old_tensors, tensors = old_model.named_tensors(), transformed(spec, [old_model], start.new_experts).named_tensors()
    for name, tensor in old_tensors.items():
        if ".experts." not in name:
            assert torch.equal(tensors[name], tensor)
            continue
        expected = [tensor[2], tensor[1], (sum(t.double() for t in tensor) / 3).float(), tensor[0]]
        assert torch.equal(tensors[name], torch.stack(expected))
    trained_model = start_model(old_model.spec)._replace(sibling=tiny_spec())
    # The optimizer's moments are copied only for the same experts in the same order.
    with pytest.raises(SpecError, match=r"start\.optimizer is true, but its experts are a, b, c, in this order"):
        check_start(start.model_copy(update={"optimizer": True}), spec, [trained_model])
    check_start(StartSpec(**{"from": "run", "optimizer": True}), old_model.spec, [trained_model])
    with pytest.raises(SpecError, match="it is no new expert; the new ones are new, mean"):
        check_start(StartSpec(**{"from": "run", "new_experts": {"a": "b"}}), spec, [start_model(old_model.spec)])
    with pytest.raises(SpecError, match="the start has no expert d; choose from a, b, c"):
        check_start(StartSpec(**{"from": "run", "new_experts": {"new": "d"}}), spec, [start_model(old_model.spec)])


@pytest.mark.parametrize("count", [1, 3])
def test_dense_models_become_the_experts_of_domains(count):
    """Dense models that differ only in their feed-forward layers give each domain the logits of its own model."""
    dense = ModelSpec(**DENSE)
    models = [random_model(dense)]
    for _ in range(count - 1):
        models.append(copy.deepcopy(models[0]))
        for block in models[-1].blocks:
            for parameter in block.ffn.parameters():
                parameter.data.normal_(std=0.02)
    moe = MoESpec(router="domain", experts=3, top_k=1, heads=1, d_expert=48, domains=["a", "b", "c"], every=1)
    spec = dense.with_moe(moe)
    fields = {"from": ["a", "b", "c"], "how": "mix"} if count > 1 else {"from": "a", "how": "upcycle"}
    check_start(StartSpec(**fields), spec, [start_model(dense)] * count)
    model = transformed(spec, models)
    for domain in range(3):
        logits = model(TOKENS, domain_B=torch.full((len(TOKENS),), domain)).logits_BTV
        dense_logits = models[domain if count > 1 else 0](TOKENS).logits_BTV
        torch.testing.assert_close(logits, dense_logits, rtol=0, atol=1e-5)
