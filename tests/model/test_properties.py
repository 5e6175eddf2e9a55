"""Properties of a mixture-of-experts layer for all heads, experts, routers, capacities, dtypes and backbones."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mhmoe_kernels import grouped
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.model.init import init_weights
from mhmoe_ray.spec import ModelSpec
from tests.model.drawn import WIDTH, layers, specs

pytestmark = pytest.mark.long

common = settings(deadline=None, max_examples=60)
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])
GATES = {torch.float64: torch.float64, torch.float32: torch.float32, torch.bfloat16: torch.float32}


@common
@given(data=st.data(), dtype=DTYPES)
@torch.no_grad()
def test_shapes_gates_and_counts_are_consistent(data, dtype):
    """Each row has k different experts, and gates that are at least 0 and add up to at most 1. Each route is kept or
    counted as dropped, and it is dropped only if its expert's capacity is used up."""
    layer, moe, x = data.draw(layers(batch=(0, 4), dtype=dtype))
    y, routing = layer(x)
    rows = x.shape[0] * x.shape[1] * moe.heads
    assert (y.shape, y.dtype) == (x.shape, dtype)
    assert routing.expert_NK.shape == routing.gate_NK.shape == (rows, moe.top_k)
    assert routing.gate_NK.dtype == GATES[dtype]
    assert all(torch.isfinite(t).all() for t in (y, routing.gate_NK, routing.balance_loss, routing.z_loss))

    is_chosen = torch.zeros(rows, moe.experts, dtype=torch.bool).scatter_(1, routing.expert_NK, True)
    assert (is_chosen.sum(1) == moe.top_k).all(), "an expert is chosen twice"

    sums = routing.gate_NK.sum(1)
    if moe.normalize_gates and moe.capacity_factor is None:
        torch.testing.assert_close(sums, torch.ones_like(sums))
    assert (routing.gate_NK >= 0).all()
    assert (sums <= 1 + 1e-5).all()

    kept_NK = routing.gate_NK > 0
    assert torch.equal(routing.count_E, torch.bincount(routing.expert_NK[kept_NK], minlength=moe.experts))
    assert int(routing.dropped_routes) == rows * moe.top_k - int(routing.count_E.sum())
    if moe.capacity_factor is None:
        assert int(routing.dropped_routes) == 0
    else:
        capacity = moe.expert_capacity(rows)
        assert (routing.count_E <= capacity).all()
        assert (routing.count_E[routing.expert_NK[~kept_NK]] == capacity).all(), "dropped though there was room"


@common
@given(data=st.data())
@torch.no_grad()
def test_sub_tokens_are_slices_of_their_token_token_by_token(data):
    """Sub-token x_i^j of width D has features j D to (j + 1) D of token i after the head projection, in row i h + j
    (section 3.1 of the first MH-MoE paper, where D is d/h)."""
    layer, moe, x = data.draw(layers())
    mixed, width = layer.head(x).flatten(0, 1), moe.d_sub_token or WIDTH // moe.heads
    calls = []
    layer.dispatch = lambda x_ND, routing, experts, shared: (calls.append(x_ND) or x_ND, None)
    layer(x)
    for i, token in enumerate(mixed):
        for j in range(moe.heads):
            assert torch.equal(calls[0][i * moe.heads + j], token[j * width : (j + 1) * width])


@common
@given(data=st.data(), dtype=DTYPES, heads=st.sampled_from([1, 2, 3, 4, 6]), experts=st.integers(1, 6))
@torch.no_grad()
def test_experts_that_return_their_input_give_the_tokens_back(data, dtype, heads, experts):
    """The split, the sort by expert and back, and the join change no bit of a token, because each gate is exactly 1."""
    layer_strategy = layers(
        dtype=dtype, heads=heads, experts=experts, top_k=1, capacity_factor=None, router="linear", d_shared=0,
        head_projection=False, merge_projection=False, sub_token_residual=False,
    )  # fmt: skip
    layer, _, x = data.draw(layer_strategy)
    # With large scores, softmax gives 1 and 0, unless two experts score alike.
    layer.router.scores.weight_ED.mul_(1e6)
    if experts > 1:
        best_N2 = layer.router.scores(x.reshape(-1, WIDTH // heads).to(GATES[dtype])).topk(2).values
        assume((best_N2[:, 0] - best_N2[:, 1] > 50).all())
    # Kernel `reference` calls this function, and kernel `grouped` the one that is patched below.
    layer.experts.function = lambda x_ND, *weights: x_ND
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped, "run_sorted", lambda x_RD, count_E, weights: x_RD)
        y, routing = layer(x)
    assert (routing.gate_NK == 1).all()
    assert torch.equal(y, x)


@common
@given(data=st.data(), top_k=st.integers(2, 4))
@torch.no_grad()
def test_identical_experts_with_normalized_gates_act_as_one_expert(data, top_k):
    layer_strategy = layers(
        experts=5, top_k=top_k, capacity_factor=None, normalize_gates=True, d_shared=0, sub_token_residual=False,
        merge_projection=False,
    )  # fmt: skip
    layer, _, x = data.draw(layer_strategy)
    for stacked in layer.experts.parameters():
        stacked.copy_(stacked[:1].expand_as(stacked).clone())
    y, _ = layer(x)
    x_ND = layer.head(x).reshape(-1, WIDTH // layer.heads)
    expected = layer.experts.function(x_ND, *(p[0] for p in layer.experts.parameters()))
    torch.testing.assert_close(y, expected.view_as(x))


@common
@given(data=st.data())
@torch.no_grad()
def test_permuting_experts_changes_only_their_ids(data):
    """Outputs and the balance loss stay the same, and ids and counts are permuted like the experts."""
    layer, moe, x = data.draw(layers(bias_rate=0.1))
    scores = layer.router.scores
    layer.router.bias_E.copy_(torch.randn(moe.experts, generator=torch.Generator().manual_seed(0)) / 10)
    expected, routing = layer(x)
    order = torch.tensor(data.draw(st.permutations(range(moe.experts))))
    by_expert = scores.weight_ED if moe.router == "linear" else scores.expert_EQ
    for weight in [by_expert, layer.router.bias_E, *layer.experts.parameters()]:
        weight.copy_(weight[order].clone())
    output, renamed = layer(x)
    torch.testing.assert_close(output, expected)
    assert torch.equal(order[renamed.expert_NK], routing.expert_NK)
    assert torch.equal(renamed.count_E, routing.count_E[order])
    torch.testing.assert_close(renamed.balance_loss, routing.balance_loss)


@common
@given(data=st.data(), dtype=DTYPES)
def test_an_output_depends_on_its_own_token_only(data, dtype):
    """The derivative of a token's output with respect to any other token's input is exactly 0, also in other sequences.

    This holds with a limited capacity too, where other tokens decide only which routes are dropped.
    """
    layer, _, x = data.draw(layers(dtype=dtype))
    x.requires_grad_()
    y, _ = layer(x)
    b, t = (data.draw(st.integers(0, n - 1)) for n in x.shape[:2])
    [grad] = torch.autograd.grad(y[b, t].float().square().sum(), [x], materialize_grads=True)
    is_other_token = torch.ones(x.shape[:2], dtype=torch.bool)
    is_other_token[b, t] = False
    assert not grad[is_other_token].any()


@common
@given(data=st.data())
@torch.no_grad()
def test_without_drops_other_tokens_change_nothing(data):
    layer, _, x = data.draw(layers(capacity_factor=None))
    expected, _ = layer(x)
    b, t = (data.draw(st.integers(0, n - 1)) for n in x.shape[:2])
    changed = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(9))
    changed[b, t] = x[b, t]
    output, _ = layer(changed)
    torch.testing.assert_close(output[b, t], expected[b, t], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(layer(x[b : b + 1, t : t + 1])[0][0, 0], expected[b, t], atol=1e-12, rtol=1e-12)


@common
@given(data=st.data(), used_experts=st.integers(1, 5))
def test_experts_without_rows_are_not_touched(data, used_experts):
    """NaN in the weights of experts without rows changes no output, and the gradients of these weights are 0."""
    layer, _, x = data.draw(layers(experts=6, top_k=data.draw(st.integers(1, used_experts)), bias_rate=0.1))
    layer.router.bias_E[used_experts:] = -10.0
    with torch.no_grad():
        expected, _ = layer(x)
        for weight in layer.experts.parameters():
            weight[used_experts:] = torch.nan
    y, routing = layer(x)
    assert not routing.count_E[used_experts:].any()
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    for weight in layer.experts.parameters():
        assert not weight.grad[used_experts:].any()
        assert torch.isfinite(weight.grad).all()


@common
@given(data=st.data())
def test_empty_batch_runs_forward_and_backward(data):
    """The outputs are empty, and the gradients of weights are absent or 0."""
    layer, moe, x = data.draw(layers(batch=(0, 0)))
    x.requires_grad_()
    y, routing = layer(x)
    (y.sum() + routing.balance_loss + routing.z_loss).backward()
    assert (y.shape, x.grad.shape) == (x.shape, x.shape)
    assert routing.count_E.tolist() == [0] * moe.experts
    assert all(p.grad is None or not p.grad.any() for p in layer.parameters())


@common
@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
@torch.no_grad()
def test_lower_precision_is_near_double(data, dtype):
    """The outputs in `dtype` and in float64 are close for the same rounded weights and rows.

    There is no head projection, so that both precisions route the same rows and rounding changes no route.
    """
    layer, _, x = data.draw(layers(dtype=dtype, head_projection=False))
    y, routing = layer(x)
    exact, oracle = layer.double()(x.double())
    assert torch.equal(routing.expert_NK, oracle.expert_NK)
    error = (y.double() - exact).norm() / exact.norm().clamp_min(1e-3)
    assert error < {torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]


@settings(max_examples=80)
@given(data=st.data())
@torch.no_grad()
def test_a_decoder_without_drops_is_causal_and_keeps_sequences_apart(data):
    layer_spec = data.draw(specs(capacity_factor=None))
    spec = ModelSpec.model_validate(layer_spec.model_dump() | {"layers": 2})
    model = Decoder(spec)
    init_weights(model, data.draw(st.integers(0, 100)))
    model.double()
    x = torch.randint(9, (2, 7), generator=torch.Generator().manual_seed(data.draw(st.integers(0, 100))))
    t = data.draw(st.integers(0, 6))
    changed = x.clone()
    changed[0, t] = (x[0, t] + 1) % 9
    # The logits are not equal bit for bit: the changed token may go to other experts, where it shifts other rows in the
    # matrix product, and the rounding depends on the place of a row.
    difference = (model(changed).logits_BTV - model(x).logits_BTV).abs().amax(-1)
    assert (difference[0, :t] < 1e-12).all(), "a later token reached back"
    assert (difference[1] < 1e-12).all(), "another sequence is touched"
    assert difference[0, t] > 1e-9, "without an effect the test could not fail"
