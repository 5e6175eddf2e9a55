"""Tests of planned FLOPs and bytes of the experts' computation, against counts of the operations that run."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mhmoe_kernels.grouped import pieces
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.model.init import init_weights
from mhmoe_ray.planner.expert_step import expert_step
from mhmoe_ray.planner.sizes import compute_sizes, flops_per_token
from tests.support.specs import tiny_spec

MODELS = [
    {},
    {"backbone": "subln"},
    {"moe": {"heads": 4, "experts": 6, "top_k": 3, "d_expert": 20, "every": 1, "d_shared": 12, "router": "xmoe"}},
    {"moe": {"heads": 1, "experts": 3, "top_k": 1, "d_expert": 40, "router": "xmoe_torchscale"}},
    {"moe": None},
]


@pytest.fixture(autouse=True)
def exact_row_counts(monkeypatch):
    """Let kernel `grouped` compute exact numbers of rows; on a CPU it rounds them up, which the plan does not count."""
    monkeypatch.setattr(pieces, "WINDOW_STEPS", 1 << 20)


def spec_of(model):
    """Return the tiny spec with the keys of `model`; d_ff is left out if all layers have experts."""
    model = {**model}
    if (model.get("moe") or {}).get("every") == 1:
        model["d_ff"] = None
    return tiny_spec(model=model)


def decoder(spec):
    model = Decoder(spec.model)
    init_weights(model, 0)
    return model.requires_grad_(False)


class MatrixProducts(TorchDispatchMode):
    """Mode that adds up the bytes of operands and results of all matrix products while it is active."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        aten = torch.ops.aten
        if function in (aten.mm.default, aten.mm.out, aten.addmm.default, aten.addmm.out):
            self.bytes += sum(t.nbytes for t in [*args, result] if isinstance(t, torch.Tensor) and t.ndim == 2)
        return result


@pytest.mark.parametrize("model", MODELS)
def test_multiply_adds_are_those_that_torch_counts(model):
    spec = spec_of(model)
    token = torch.randint(300, (2, 16))
    counter = FlopCounterMode(display=False)
    with counter:
        decoder(spec)(token)
    counts = counter.get_flop_counts()["Global"]
    products = sum(counts.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    expected = 2 * 32 * compute_sizes(spec.model).macs_per_token
    if spec.model.moe and spec.model.moe.router == "xmoe":  # its balance loss computes the scores once more
        expected += 2 * 32 * compute_sizes(spec.model).router_macs_per_token
    assert products == expected


@pytest.mark.parametrize("model", [m for m in MODELS if m.get("moe", 1)])
def test_bytes_of_the_expert_step_are_those_of_its_matrix_products(model):
    spec = spec_of(model)
    layer = decoder(spec).moe_layers()[0]
    step = expert_step(spec)
    rows = step.rows // spec.model.moe.top_k
    # The routes are assigned to the experts in turn, so that every expert gets rows.
    expert_NK = (torch.arange(rows)[:, None] + torch.arange(spec.model.moe.top_k)) % spec.model.moe.experts
    x_ND = torch.randn(rows, spec.model.d_model // spec.model.moe.heads)
    with MatrixProducts() as products:
        layer.experts.compute(x_ND, expert_NK, torch.ones(expert_NK.shape))
    assert step.bytes == products.bytes
    assert step.rows == 2 * 16 * spec.model.moe.heads * spec.model.moe.top_k


def test_a_rank_of_a_group_gets_as_many_rows_and_fewer_weights():
    single_rank, rank_of_group = expert_step(tiny_spec()), expert_step(tiny_spec(cluster={"workers": 4, "ep": 4}))
    assert (single_rank.rows, single_rank.flops) == (rank_of_group.rows, rank_of_group.flops)
    # A rank of the group has three experts fewer, with three matrices each.
    assert single_rank.bytes - rank_of_group.bytes == 3 * 3 * 16 * 24 * 4
    assert rank_of_group.intensity == pytest.approx(rank_of_group.flops / rank_of_group.bytes)
    half = expert_step(tiny_spec(train={"precision": "bfloat16"}))
    assert half.bytes * 2 == single_rank.bytes
    assert math.isclose(half.intensity, 2 * single_rank.intensity)


def test_training_costs_three_forward_passes_and_attention_grows_with_length():
    spec = tiny_spec().model
    short, long = flops_per_token(spec, 16), flops_per_token(spec, 1016)
    assert short.training == 3 * short.forward
    assert long.forward - short.forward == 2 * spec.layers * spec.d_model * 1000
    # Token t attends to t + 1 keys. Over all heads it needs one product for the scores and one for the values.
    by_hand = sum(2 * 2 * spec.d_model * (t + 1) for t in range(16)) / 16 * spec.layers
    assert short.forward == 2 * compute_sizes(spec).macs_per_token + by_hand
