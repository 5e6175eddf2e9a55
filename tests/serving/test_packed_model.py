"""Tests of models with packed or padded matrices for inference, against the training model."""

import pytest
import torch

from mhmoe_kernels import packed
from mhmoe_kernels.packed import PackedMatrix, PaddedMatrix
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.serving.engine.packed_model import PackedModel
from mhmoe_ray.spec import ModelSpec
from tests.serving.conftest import SPEC, build_model

pytestmark = pytest.mark.cpu
needs_packing = pytest.mark.skipif(
    packed.unavailable_reason(torch.float32) is not None, reason="oneDNN packs nothing here"
)


def changed_spec(moe=None, **trunk):
    return ModelSpec.model_validate(SPEC.model_dump() | trunk | {"moe": SPEC.moe.model_dump() | (moe or {})})


KINDS = {
    "MH-MoE": SPEC,
    "own output layer, grouped queries": changed_spec(tied_embeddings=False, kv_heads=2),
    "shared expert, residual, projections of two layers": changed_spec(
        {"d_shared": 24, "sub_token_residual": True, "projection_layers": 2}
    ),
    "wide sub-tokens": changed_spec({"heads": 3, "d_sub_token": 24, "projection_layers": 2}),
    "SMoE in every layer, selection bias": changed_spec({"heads": 1, "bias_rate": 0.1, "every": 1}, d_ff=None),
    "X-MoE, subln": changed_spec({"router": "xmoe", "normalize_gates": True}, backbone="subln"),
    "dense": ModelSpec.model_validate(SPEC.model_dump() | {"moe": None}),
}


@pytest.mark.parametrize("matrix", [pytest.param(PackedMatrix, marks=needs_packing), PaddedMatrix])
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_packed_model_equals_the_training_model(kind, matrix):
    model, packed_model = build_model(KINDS[kind]), build_model(KINDS[kind])
    biases = [name for name, _ in model.named_buffers() if name.endswith("bias_E")]
    assert bool(biases) == ("bias" in kind)
    for copy in (model, packed_model):
        # In an untrained model the biases are 0, so that a missing one would not show.
        for name in biases:
            copy.get_buffer(name).copy_(torch.linspace(0.3, -0.3, copy.get_buffer(name).numel()))
    PackedModel(packed_model, matrix)
    token_BT = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(1))
    expected, actual = model(token_BT), packed_model(token_BT)
    torch.testing.assert_close(actual.logits_BTV, expected.logits_BTV, atol=1e-4, rtol=1e-4)
    for expected_routing, actual_routing in zip(expected.routing, actual.routing, strict=True):
        assert torch.equal(actual_routing.expert_NK, expected_routing.expert_NK)


@needs_packing
def test_packing_releases_the_plain_weights():
    """Plain weights remain only in the embedding, which is read row by row, and in the small norms and router."""
    model = build_model()
    PackedModel(model, PackedMatrix)
    remaining_names = {name.rpartition(".")[0].rpartition(".")[2] for name, _ in model.named_parameters()}
    assert remaining_names == {"embedding", "attention_norm", "ffn_norm", "norm", "scores"}
    assert isinstance(model, Decoder)
