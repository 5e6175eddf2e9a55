"""Packed models compute the same as the model that was trained."""

import pytest
import torch

from mhmoe_kernels import packed
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.serve.engine.packed_model import pack
from mhmoe_ray.spec import ModelSpec
from tests.serve.conftest import SPEC, build_model

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(packed.why_not(torch.float32) is not None, reason="oneDNN packs nothing here"),
]


def changed(moe=None, **trunk):
    return ModelSpec.model_validate(SPEC.model_dump() | trunk | {"moe": SPEC.moe.model_dump() | (moe or {})})


KINDS = {
    "MH-MoE": SPEC,
    "own output layer, grouped queries": changed(tied_embeddings=False, kv_heads=2),
    "shared expert, residual, projections of two layers": changed(
        {"d_shared": 24, "sub_token_residual": True, "projection_layers": 2}
    ),
    "SMoE in every layer, selection bias": changed({"heads": 1, "bias_rate": 0.1, "every": 1}, d_ff=None),
    "X-MoE, subln": changed({"router": "xmoe", "normalize_gates": True}, backbone="subln"),
    "dense": ModelSpec.model_validate(SPEC.model_dump() | {"moe": None}),
}


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_logits_and_choices_are_the_training_models(kind):
    model, ours = build_model(KINDS[kind]), build_model(KINDS[kind])
    biases = [name for name, _ in model.named_buffers() if name.endswith("bias_E")]
    assert bool(biases) == ("bias" in kind)
    for built in (model, ours):
        for name in biases:  # which are 0 until a model has learnt
            built.get_buffer(name).copy_(torch.linspace(0.3, -0.3, built.get_buffer(name).numel()))
    pack(ours)
    token_BT = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(1))
    expected, found = model(token_BT), ours(token_BT)
    torch.testing.assert_close(found.logits_BTV, expected.logits_BTV, atol=1e-4, rtol=1e-4)
    for theirs, own in zip(expected.routing, found.routing, strict=True):
        assert torch.equal(own.expert_NK, theirs.expert_NK)


def test_the_plain_weights_are_given_up():
    """All but the embedding, the norms and the router are given up; these are read row by row or are small."""
    model = build_model()
    pack(model)
    left = {name.rpartition(".")[0].rpartition(".")[2] for name, _ in model.named_parameters()}
    assert left == {"embedding", "attention_norm", "ffn_norm", "norm", "scores"}
    assert isinstance(model, Decoder)
