import math

import pytest
import torch

from mhmoe_ray.model.build import build_model
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.model.init import init_weights
from mhmoe_ray.model.router import SCORES_BY_ROUTER
from mhmoe_ray.spec import ModelSpec, MoESpec
from tests.support.specs import tiny_spec
from tests.support.visions import vision_spec


def initial_weights(seed=0, expert_ids=None):
    """Return the initial weights of a tiny model by name, with all experts or only those of `expert_ids`."""
    model = Decoder(tiny_spec().model, expert_ids)
    init_weights(model, seed)
    return dict(model.named_parameters())


def test_a_rank_with_some_experts_gets_the_same_weights_as_a_process_with_all():
    all_weights, rank_weights = initial_weights(), initial_weights(expert_ids=range(2, 4))
    for name, tensor in rank_weights.items():
        full_tensor = all_weights[name]
        assert torch.equal(tensor, full_tensor[2:4] if ".experts." in name else full_tensor), name


def test_another_seed_gives_other_weights_and_no_two_experts_are_equal():
    a, b = initial_weights(0), initial_weights(1)
    random = [name for name in a if "norm" not in name and not name.endswith("merge.bias")]
    assert not any(torch.equal(a[name], b[name]) for name in random)
    experts = a["blocks.1.moe.experts.up_EFD"]
    assert len({tuple(e.flatten().tolist()) for e in experts}) == 4


def test_head_and_merge_projections_have_the_authors_initial_weights():
    """Weights are Xavier uniform, divided by sqrt 2 for the head projection; the merge projection's bias is 0."""
    w = initial_weights()
    bound = math.sqrt(6 / 64)  # the bound of Xavier's initialization for 32 x 32
    assert 0.95 * bound < w["blocks.1.moe.merge.weight"].abs().max() <= bound
    assert 0.95 * bound < w["blocks.1.moe.head.weight"].abs().max() * math.sqrt(2) <= bound
    assert not w["blocks.1.moe.merge.bias"].any()
    assert 0 < w["blocks.1.moe.head.bias"].abs().max() <= 32**-0.5


@pytest.mark.parametrize("projection_layers", [1, 3])
def test_projections_of_wide_sub_tokens_have_the_bounds_of_their_shapes(projection_layers):
    """Xavier's bound depends on both dimensions of a matrix, and the bound of a bias on the fan-in of its layer."""
    d, joined = 64, 3 * 50
    moe = MoESpec(heads=3, d_sub_token=50, experts=2, top_k=1, d_expert=4, every=1, projection_layers=projection_layers)
    model = Decoder(ModelSpec(vocab_size=5, d_model=d, layers=1, attention_heads=1, moe=moe))
    init_weights(model, 0)
    widths = [d, *[joined] * projection_layers]
    for side, side_widths, gain in (("head", widths, 2**-0.5), ("merge", widths[::-1], 1.0)):
        linear_layers = [m for m in getattr(model.blocks[0].moe, side).modules() if isinstance(m, torch.nn.Linear)]
        for linear, fan_in, fan_out in zip(linear_layers, side_widths[:-1], side_widths[1:], strict=True):
            assert linear.weight.shape == (fan_out, fan_in)
            bound = gain * math.sqrt(6 / (fan_in + fan_out))
            assert 0.98 * bound < linear.weight.abs().max() <= bound
            bias_bound = fan_in**-0.5 if side == "head" else 0.0
            assert 0.9 * bias_bound <= linear.bias.abs().max() <= bias_bound


@pytest.mark.parametrize("backbone", ["llama", "subln"])
@pytest.mark.parametrize("router", list(SCORES_BY_ROUTER))
def test_every_weight_starts_within_its_bound(backbone, router):
    """Weights start as in nn.Linear (+-fan_in^-0.5), except for head and merge projections, which are Xavier uniform.

    Backbone subln multiplies some weights by sqrt(ln 2L). Embedding and output are normal and have no bound, so their
    standard deviation is checked. Norms start as the identity.
    """
    moe = MoESpec(heads=2, experts=48, top_k=1, d_expert=100, router=router, projection_layers=2)
    sizes = {"vocab_size": 500, "d_model": 64, "layers": 4, "attention_heads": 4, "d_ff": 90, "moe": moe}
    spec = ModelSpec(backbone=backbone, tied_embeddings=False, **sizes)
    model = Decoder(spec)
    init_weights(model, 0)
    scaled = math.sqrt(math.log(8)) if backbone == "subln" else 1.0
    d, sub, xavier = 64**-0.5, 32**-0.5, math.sqrt(6 / 128)
    bounds = {
        "attention.qkv.weight": (d, d, d * scaled), "attention.qkv.bias": (d, d, d * scaled),
        "attention.out.weight": d * scaled, "attention.out.bias": d * scaled,
        "ffn.gate_FD": d, "ffn.up_FD": d, "ffn.down_DF": 90**-0.5,
        "ffn.fc1_FD": d * scaled, "ffn.fc1_bias_F": d * scaled,
        "ffn.fc2_DF": 90**-0.5 * scaled, "ffn.fc2_bias_D": 90**-0.5 * scaled,
        "moe.head.0.weight": xavier * 2**-0.5, "moe.head.0.bias": d,
        "moe.head.2.weight": xavier * 2**-0.5, "moe.head.2.bias": d,
        "moe.merge.0.weight": xavier * scaled, "moe.merge.0.bias": 0.0,
        "moe.merge.2.weight": xavier * scaled, "moe.merge.2.bias": 0.0,
        "moe.router.scores.weight_ED": sub, "moe.router.scores.reduce_QD": sub,
        "moe.experts.gate_EFD": sub, "moe.experts.up_EFD": sub, "moe.experts.down_EDF": 100**-0.5,
        "moe.experts.fc1_EFD": sub * scaled, "moe.experts.fc1_bias_EF": sub * scaled,
        "moe.experts.fc2_EDF": 100**-0.5 * scaled, "moe.experts.fc2_bias_ED": 100**-0.5 * scaled,
    }  # fmt: skip
    for name, tensor in model.named_parameters():
        if name in ("embedding.weight", "output.weight"):
            assert tensor.std().item() == pytest.approx(d, rel=0.05), name
            continue
        if "norm" in name:
            assert torch.equal(tensor, torch.full_like(tensor, 0.0 if "bias" in name else 1.0)), name
            continue
        kind = name.split(".", 2)[2]
        if kind.endswith("log_temperature"):
            assert model.blocks[1].moe.router.scores.temperature.item() == pytest.approx(0.3)
        elif kind.endswith("expert_EQ"):
            # There are at least as many experts as dimensions, so the columns of the embeddings are orthogonal.
            gram = tensor.T @ tensor
            torch.testing.assert_close(gram, 0.32**2 * torch.eye(len(gram)), atol=1e-6, rtol=0)
        else:
            bound = bounds[kind]
            parts = tensor.chunk(3) if isinstance(bound, tuple) else [tensor]
            for part, b in zip(parts, bound if isinstance(bound, tuple) else [bound], strict=True):
                assert 0.85 * b <= part.abs().max() <= b, name


def test_norms_and_heads_of_vision_models_start_alike_whatever_their_names():
    """The norms of the mask head have only numbers as names, and a task may have a name such as "embedding"."""
    tree = vision_spec().model.vision.model_dump()["tasks"]
    tasks = {"normal": tree["classify"], "embedding": tree["detect"]}
    parts = {"normal": {"sources": ["drawings"], "micro_batch_size": 3}}
    parts["embedding"] = {"sources": ["scenes"], "micro_batch_size": 2}
    model = build_model(vision_spec(model__vision__tasks=tasks, data__parts=parts).model)
    init_weights(model, 0)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert all((norm.weight == 1).all() and (norm.bias == 0).all() for norm in norms)
    heads = [p for name, p in model.named_parameters() if "task_normal" in name and p.dim() > 1]
    assert len(heads) == 4
    for weight in heads:
        if weight.shape[0] != 16:  # the position embedding has 16 rows and is drawn from a normal distribution
            assert 0 < weight.abs().max() <= weight.shape[1] ** -0.5
