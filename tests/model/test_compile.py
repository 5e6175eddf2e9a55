"""Tests of compiled blocks: torch.compile sees each block as one graph, with the results of the block itself.

Backend `aot_eager` traces forward and backward as every backend does, and then runs torch's own operations, so that no
compiler is needed. tests/train/test_equivalence.py trains with the default backend.
"""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from mhmoe_ray.model import attention, decoder
from mhmoe_ray.model.attention import document_indices, document_mask, document_offsets
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.model.feedforward import CastingModule
from mhmoe_ray.model.init import init_weights
from mhmoe_ray.model.loss import Targets
from mhmoe_ray.model.trunk import routing_loss
from mhmoe_ray.spec import ModelSpec

# Tracing gives rise to warnings inside torch, which pytest would turn into errors.
pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.long]

MODEL = {"vocab_size": 97, "d_model": 32, "layers": 3, "attention_heads": 4}
MOE = {"heads": 2, "experts": 8, "top_k": 2, "d_expert": 24, "every": 1, "z_weight": 0.01}
MODELS = {
    "h-2": ({}, {}),
    "h-1": ({}, {"heads": 1}),
    "gelu": ({"backbone": "subln"}, {}),
    "static": ({}, {"capacity_factor": 1.1}),
    "masks-of-slots": ({}, {"capacity_factor": 1.0, "kernel": "capacity"}),
    "recomputed-rows": ({}, {"recompute": 0.5}),
    "sigmoid": ({}, {"scoring": "sigmoid", "bias_rate": 0.01, "normalize_gates": True, "gate_scale": 2.5}),
    "cosines": ({}, {"router": "xmoe", "router_dim": 8}),
    "groups": ({}, {"groups": 4, "top_groups": 2}),
    "sequences": ({}, {"balance_over": "sequence"}),
    "shared": ({}, {"d_shared": 24, "sub_token_residual": True}),
    "grouped-queries": ({"kv_heads": 2, "document_masks": True, "qk_norm": "head"}, {}),
}

ALWAYS = {"h-2", "gelu", "static", "sigmoid", "shared"}
"""Names in `MODELS` of the models whose test is not marked as slow."""


def losses_and_gradients(spec, dtype, recompute, backend=None):
    """Return the losses of a batch and their gradients, of a model that is compiled if there is a backend."""
    model = Decoder(spec)
    model.recompute = recompute
    init_weights(model, seed=3)
    generator = torch.Generator().manual_seed(5)
    token_BT = torch.randint(spec.vocab_size, (2, 13), generator=generator)
    if backend is not None:
        model.compile_blocks(backend=backend, fullgraph=True)
    targets = Targets(token_BT[:, 1:], torch.ones(2, 12, dtype=torch.bool))
    document_BT = document_indices(token_BT[:, :-1] < 20) if spec.document_masks else None
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        # A training step casts weights before its first micro-batch. By default torch.compile assumes static sizes for
        # parameters, but not for their casts.
        for layer in (module for module in model.modules() if isinstance(module, CastingModule)):
            layer.step_casts = layer.cast_weights()
        output = model(token_BT[:, :-1], document_BT=document_BT, targets=targets)
    losses = [output.loss.sum, routing_loss(spec, output.routing)]
    sum(losses).backward()
    return [loss.detach() for loss in losses], {name: p.grad for name, p in model.named_parameters()}


@pytest.fixture
def compilations():
    """Yield the counters of torch.compile, with nothing compiled so far."""
    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ALWAYS else [pytest.mark.slow]) for name in MODELS]
)
def test_equal_blocks_are_one_graph_with_the_results_of_the_block(compilations, name):
    model, moe = MODELS[name]
    spec = ModelSpec.model_validate({**MODEL, **model, "moe": {**MOE, **moe}})
    expected_losses, expected_gradients = losses_and_gradients(spec, torch.float32, "none")
    losses, gradients = losses_and_gradients(spec, torch.float32, "none", "aot_eager")
    assert compilations["stats"]["unique_graphs"] == 1
    assert not compilations["graph_break"]
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("recompute", ["none", "exchange", "block"])
def test_blocks_are_one_graph_in_bfloat16_and_recomputed(compilations, recompute):
    spec = ModelSpec.model_validate({**MODEL, "moe": MOE})
    expected_losses, _ = losses_and_gradients(spec, torch.bfloat16, "none")
    losses, _ = losses_and_gradients(spec, torch.bfloat16, recompute, "aot_eager")
    assert compilations["stats"]["unique_graphs"] == 1
    assert not compilations["graph_break"]
    torch.testing.assert_close(losses, expected_losses, rtol=1e-3, atol=1e-3)


def test_models_of_several_sizes_are_compiled_without_a_break(compilations):
    """Code for any sizes, which torch by default compiles for a second model, cannot choose a kernel by the sizes."""
    for number, heads in enumerate((1, 2, 4), start=1):
        spec = ModelSpec.model_validate({**MODEL, "moe": {**MOE, "heads": heads, "d_expert": 12 * heads}})
        losses_and_gradients(spec, torch.bfloat16, "none", "aot_eager")
        assert compilations["stats"]["unique_graphs"] == number
    assert not compilations["graph_break"]


def test_dense_blocks_and_blocks_with_experts_are_two_graphs(compilations):
    spec = ModelSpec.model_validate({**MODEL, "d_ff": 48, "layers": 4, "moe": {**MOE, "every": 2}})
    expected_losses, _ = losses_and_gradients(spec, torch.float32, "none")
    losses, _ = losses_and_gradients(spec, torch.float32, "none", "aot_eager")
    assert compilations["stats"]["unique_graphs"] == 2
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-6)


def attend_by_offsets(q_BHTC, k_BHTC, v_BHTC, offset_N1):
    """Compute attention with the mask that the offsets describe, in place of the variable-length kernel of GPUs."""
    B, _, T, _ = q_BHTC.shape
    document_BT = torch.searchsorted(offset_N1, torch.arange(B * T, dtype=torch.int32), right=True).view(B, T)
    mask_B1TT = document_mask(document_BT, q_BHTC.dtype)
    return F.scaled_dot_product_attention(q_BHTC, k_BHTC, v_BHTC, attn_mask=mask_B1TT)


def test_any_number_of_documents_has_the_same_graph(monkeypatch, compilations):
    monkeypatch.setattr(decoder, "has_variable_length_kernel", lambda spec, x: True)
    monkeypatch.setattr(attention, "_attend_within_documents", attend_by_offsets)
    spec = ModelSpec.model_validate({**MODEL, "document_masks": True, "moe": MOE})
    model = Decoder(spec)
    init_weights(model, seed=3)
    token_BT = torch.arange(24).view(2, 12) % spec.vocab_size
    starts = [torch.arange(24).view(2, 12) % length == 0 for length in (12, 5, 3)]

    def logits():
        for starts_BT in starts:
            documents = {"document_BT": document_indices(starts_BT), "document_offset_N1": document_offsets(starts_BT)}
            yield model(token_BT, **documents).logits_BTV.detach()

    expected = list(logits())
    model.compile_blocks(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(list(logits()), expected, rtol=1e-5, atol=1e-5)
    assert compilations["stats"]["unique_graphs"] == 1
