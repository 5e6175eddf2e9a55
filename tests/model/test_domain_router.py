"""Tests of DEMix layers: a document goes to the expert of its domain."""

import pytest
import torch
from pydantic import ValidationError

from mhmoe_ray.checkpoint.huggingface.export import export
from mhmoe_ray.checkpoint.manifest import newest_checkpoint
from mhmoe_ray.errors import CheckpointError, ServeError
from mhmoe_ray.serving.load import check_engine
from mhmoe_ray.spec import MoESpec, ServeSpec
from tests.checkpoint.huggingface.conftest import make_run
from tests.support.decoders import DOMAIN_MOE, make_domain_model


@pytest.mark.parametrize("heads", [1, 2])
def test_each_sequence_is_computed_by_the_expert_of_its_domain(heads):
    """A dense model with the weights of one expert gives the same logits for the sequences of its domain."""
    model = make_domain_model(heads=heads)
    tokens = torch.randint(300, (4, 12), generator=torch.Generator().manual_seed(0))
    domain_B = torch.tensor([2, 0, 1, 2])
    output = model(tokens, domain_B=domain_B)
    assert [r.count_E.tolist() for r in output.routing] == [[12 * heads, 12 * heads, 24 * heads]]
    for row, domain in enumerate(domain_B.tolist()):
        single = make_domain_model(heads=heads, domains=["x"], experts=1)
        tensors = {
            name: tensor[domain : domain + 1] if ".experts." in name else tensor
            for name, tensor in model.named_tensors().items()
        }
        single.load_state_dict(tensors)
        expected = single(tokens[row : row + 1], domain_B=torch.zeros(1, dtype=torch.int64)).logits_BTV
        torch.testing.assert_close(output.logits_BTV[row : row + 1], expected)


def test_only_the_experts_of_a_batch_get_gradients():
    model = make_domain_model()
    logits = model(torch.arange(12)[None], domain_B=torch.tensor([1])).logits_BTV
    logits.logsumexp(-1).sum().backward()
    gradient = model.moe_layers()[0].experts.gate_EFD.grad
    assert [bool(gradient[e].any()) for e in range(3)] == [False, True, False]


def test_an_expert_has_the_name_of_a_domain_or_of_its_source():
    moe = MoESpec.model_validate(DOMAIN_MOE)
    assert [moe.expert_of_domain(name) for name in ("web/de", "web/en", "code", "code/py", "books/a")] == [
        2,
        0,
        1,
        1,
        None,
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"domains": None}, "router domain needs domains"),
        ({"experts": 4}, "experts is 4, but domains names 3"),
        ({"domains": ["a", "a", "b"]}, "has a name twice"),
        ({"top_k": 2}, "set top_k to 1"),
        ({"router": "linear"}, "would be ignored with router linear"),
        ({"jitter": 0.1}, "computes no scores, so jitter would be ignored"),
        ({"groups": 3}, "computes no scores, so groups would be ignored"),
        ({"groups": 3, "top_groups": 2}, "computes no scores, so groups would be ignored"),
        ({"balance_weight": 0.02}, "computes no scores, so balance_weight would be ignored"),
        ({"bias_rate": 0.1}, "computes no scores, so bias_rate would be ignored"),
    ],
)
def test_settings_without_effect_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        MoESpec.model_validate({**DOMAIN_MOE, **fields})


def test_a_model_with_domains_is_neither_exported_nor_served(tmp_path):
    run = make_run(tmp_path, make_domain_model().spec)
    checkpoint, manifest, _ = newest_checkpoint(run, ("weights",))
    with pytest.raises(CheckpointError, match="its router needs the domain of a text"):
        export(checkpoint, manifest, tmp_path / "exported")
    with pytest.raises(ServeError, match="its router needs the domain of a text"):
        check_engine(manifest, ServeSpec())
