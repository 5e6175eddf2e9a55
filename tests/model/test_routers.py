"""Routers, balance, and static capacity."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mhmoe_ray.model.decoder import Decoder, routing_loss, token_losses
from mhmoe_ray.model.init import init_weights
from mhmoe_ray.model.noise import Noise
from mhmoe_ray.model.router import Router, balance_loss, fits, moved_bias, z_loss
from mhmoe_ray.spec import ModelSpec, MoESpec
from mhmoe_ray.spec.model import ROUTERS


def router(**fields):
    moe = MoESpec(**{"experts": 6, "top_k": 2, "d_expert": 4, **fields})
    made = Router(8, moe)
    for i, p in enumerate(made.parameters()):
        torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(i))
    if moe.router == "xmoe":
        torch.nn.init.constant_(made.scores.log_temperature, math.log(0.4 - 0.01))
    return made.double()


def rows(n=40, seed=0):
    return torch.randn(n, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_xmoe_is_the_published_formula():
    r, x = router(router="xmoe", router_dim=5), rows()
    s = r.scores
    projected = x @ s.reduce_QD.T
    cosine = torch.stack([F.cosine_similarity(projected, e[None], dim=-1) for e in s.expert_EQ], dim=1)
    probability = (cosine / 0.4).softmax(-1)
    found = r(x)
    assert torch.equal(found.expert_NK, probability.topk(2).indices)
    torch.testing.assert_close(found.gate_NK, probability.topk(2).values)
    # The balance loss divides by the initial temperature, which the learnt one cannot please.
    fixed = balance_loss((cosine / 0.3).softmax(-1), found.expert_NK[:, :1])
    torch.testing.assert_close(found.balance_loss, fixed)


def test_a_temperature_that_wants_to_fall_stays_positive():
    r, x = router(router="xmoe"), rows()
    order = r.scores(x).argsort(dim=-1)
    optimizer = torch.optim.Adam([r.scores.log_temperature], lr=0.05)
    for _ in range(1000):
        optimizer.zero_grad()
        r.scores.temperature.backward()
        optimizer.step()
    assert 0.01 <= r.scores.temperature < 0.02
    assert torch.equal(r.scores(x).argsort(dim=-1), order)
    assert r.scores(x).abs().max() <= 100


@pytest.mark.parametrize("name", ROUTERS)
def test_routing_is_float32_under_autocast_and_with_bfloat16_weights(name):
    r = router(router=name).bfloat16()
    wide = router(router=name).float()
    wide.load_state_dict({k: v.float() for k, v in r.state_dict().items()})
    x = rows(400).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        rounded, autocast = r(x), wide(x)
    for found in (rounded, autocast):
        for got, expected in zip(found[:-1], wide(x.float())[:-1], strict=True):
            assert torch.equal(got, expected)
            assert got.dtype == expected.dtype
    assert rounded.gate_NK.dtype == rounded.balance_loss.dtype == torch.float32


@pytest.mark.parametrize("name", ROUTERS)
def test_normalised_gates_are_shares_of_the_chosen_probabilities(name):
    gates = router(router=name)(rows()).gate_NK
    torch.testing.assert_close(
        router(router=name, normalize_gates=True)(rows()).gate_NK, gates / gates.sum(-1)[:, None]
    )


def test_normalised_gates_are_finite_where_all_chosen_probabilities_underflow():
    r = router(normalize_gates=True, bias_rate=0.1).float()
    with torch.no_grad():
        r.scores.weight_ED.copy_(torch.tensor([0.0, -300, -301, 0, 0, 0])[:, None])
        r.bias_E.copy_(torch.tensor([0.0, 2, 2, 0, 0, 0]))
    x = torch.ones(3, 8, requires_grad=True)
    found = r(x)
    assert set(found.expert_NK[0].tolist()) == {1, 2}
    torch.testing.assert_close(found.gate_NK.sum(-1), torch.ones(3))
    found.gate_NK[:, 0].sum().backward()
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(r.scores.weight_ED.grad).all()


def test_torchscales_router_normalises_the_expert_side_only():
    r, x = router(router="xmoe_torchscale"), rows()
    unit = r.scores.expert_EQ / r.scores.expert_EQ.norm(dim=1, keepdim=True)
    assert unit.shape == (6, 16)
    probability = ((x @ r.scores.reduce_QD.T) @ unit.T).softmax(-1)
    torch.testing.assert_close(r(x).gate_NK, probability.topk(2).values)


@settings(max_examples=60)
@given(n=st.integers(0, 30), experts=st.integers(1, 6), data=st.data())
def test_capacity_gives_places_first_choices_first(n, experts, data):
    k = data.draw(st.integers(1, experts))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    expert_NK = torch.rand(n, experts, generator=g).topk(k, dim=-1).indices
    wanted_NK = torch.rand(n, k, generator=g) < 0.8
    limit = data.draw(st.integers(0, 12))
    taken = [0] * experts
    expected = torch.zeros_like(wanted_NK)
    for choice in range(k):
        for row in range(n):
            e = int(expert_NK[row, choice])
            if wanted_NK[row, choice]:
                expected[row, choice] = taken[e] < limit
                taken[e] += 1
    assert torch.equal(fits(expert_NK, wanted_NK, experts, limit), expected)


def test_capacity_is_that_of_both_papers_code():
    def places(rows, experts, top_k, factor):
        return MoESpec(experts=experts, top_k=top_k, capacity_factor=factor, d_expert=1).places(rows)

    assert places(rows=2048, experts=8, top_k=2, factor=1.0) == 2 * 256
    assert places(rows=100, experts=8, top_k=1, factor=1.0) == math.ceil(100 / 8)
    assert places(rows=100, experts=8, top_k=2, factor=0.5) == 13
    assert [places(rows=10 * n, experts=n, top_k=1, factor=1.1) for n in (1, 3, 7)] == [11, 11, 11]
    assert places(rows=100, experts=8, top_k=2, factor=None) is None


@pytest.mark.parametrize("name", ROUTERS)
def test_dropped_routes_have_no_weight_and_are_counted(name):
    r = router(router=name, capacity_factor=0.5)
    found = r(rows(48))
    limit = r.moe.places(48)
    assert found.count_E.max() <= limit
    assert int(found.dropped) == int((found.gate_NK == 0).sum()) == 96 - int(found.count_E.sum()) > 0
    free = router(router=name)(rows(48))
    assert int(free.dropped) == 0
    assert torch.equal(free.gate_NK[found.gate_NK > 0], found.gate_NK[found.gate_NK > 0])


def test_serving_drops_nothing():
    r = router(capacity_factor=0.5)
    assert int(r(rows(48)).dropped) > 0
    free, served = router()(rows(48)), r.eval()(rows(48))
    assert served.places is free.places is None
    assert all(torch.equal(a, b) for a, b in zip(served[:-1], free[:-1], strict=True))


def test_second_choices_that_are_left_out_are_not_dropped():
    r, x = router(second_expert="random", normalize_gates=True), rows(400)
    free = r(x, torch.Generator().manual_seed(0))
    assert int(free.dropped) == 0
    assert int(free.count_E.sum()) < 2 * len(x)
    limited = router(second_expert="random", normalize_gates=True, capacity_factor=0.5)
    found = limited(x, torch.Generator().manual_seed(0))
    lost = (free.gate_NK > 0) & (found.gate_NK == 0)
    assert int(found.dropped) == int(lost.sum()) == int(free.count_E.sum() - found.count_E.sum()) > 0


def test_random_second_experts_are_kept_as_often_as_their_weight_says_and_always_in_evaluation():
    r = router(second_expert="random", normalize_gates=True)
    x = rows(20_000)
    everything = r(x)
    assert int(everything.dropped) == 0
    training = r(x, torch.Generator().manual_seed(0))
    kept = training.gate_NK[:, 1] > 0
    expected = (2 * everything.gate_NK[:, 1]).clamp(max=1).mean()
    assert abs(kept.double().mean().item() - expected.item()) < 0.02
    assert torch.equal(training.gate_NK[:, 0], everything.gate_NK[:, 0])


def test_jitter_is_for_training_and_the_same_for_the_same_micro_batch():
    r, x, device = router(jitter=0.3), rows(), torch.device("cpu")
    quiet = r(x).gate_NK
    noisy = [
        r(x, Noise(1, batch).generator(layer, device)).gate_NK for batch, layer in [(5, 0), (5, 0), (6, 0), (5, 1)]
    ]
    assert torch.equal(noisy[0], noisy[1])
    assert not any(torch.equal(noisy[0], other) for other in [quiet, *noisy[2:]])


def test_jitter_scales_what_the_scores_see_by_its_rate_at_most_up_and_down():
    r, seen = router(jitter=0.3), []
    r.scores.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    r(torch.ones(500, 8, dtype=torch.float64), torch.Generator().manual_seed(0))
    [x_ND] = seen
    assert 0.7 <= x_ND.min() < 0.71
    assert 1.29 < x_ND.max() <= 1.3
    assert x_ND.mean().item() == pytest.approx(1, abs=0.011)  # four standard errors of 4,000 uniform draws


def test_balance_over_all_choices_and_z_loss_against_plain_counts():
    p = rows(30).softmax(-1)
    chosen = p.topk(3).indices
    share = [sum(int(e) == i for row in chosen for e in row) / 90 for i in range(8)]
    expected = 8 * sum(float(p[:, i].mean()) * share[i] for i in range(8))
    assert balance_loss(p, chosen).item() == pytest.approx(expected)
    # Rows of unlike weight, so that a mean of squares is not the square of a mean.
    logits = torch.tensor([[1.0, 1, 1, 1], [1, 2, 3, 10]]).log()
    assert z_loss(logits).item() == pytest.approx((math.log(4) ** 2 + math.log(16) ** 2) / 2)


def test_what_routing_adds_to_the_loss_is_both_losses_of_all_layers_by_their_weights():
    moe = MoESpec(d_expert=4, every=1, balance_weight=0.3, z_weight=0.1)
    spec = ModelSpec(vocab_size=7, d_model=8, layers=2, attention_heads=2, moe=moe)
    one = router()(rows())
    layers = [
        one._replace(balance_loss=torch.tensor(balance), z_loss=torch.tensor(z))
        for balance, z in ((1.5, 0.25), (2.0, 4.0))
    ]
    assert routing_loss(spec, layers).item() == pytest.approx(0.3 * (1.5 + 2.0) + 0.1 * (0.25 + 4.0))


def test_a_selection_bias_moves_load_without_touching_weights():
    assert moved_bias(torch.zeros(3), torch.tensor([5, 1, 3]), 0.1).tolist() == pytest.approx([-0.1, 0.1, 0.0])
    r, x = router(bias_rate=0.002), rows(600)
    before = r(x)
    for _ in range(300):
        r.bias_E.copy_(moved_bias(r.bias_E, r(x).count_E, 0.002))
    after = r(x)
    assert after.count_E.double().std() < 0.3 * before.count_E.double().std()
    probability = (x @ r.scores.weight_ED.T).softmax(-1)
    torch.testing.assert_close(after.gate_NK, probability.gather(1, after.expert_NK))


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("experts", [2, 3])
def test_a_router_of_few_experts_still_learns(name, experts):
    r = router(router=name, experts=experts, top_k=1)
    r(rows()).gate_NK.sum().backward()
    assert all(p.grad.abs().max() > 1e-6 for p in r.parameters())


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("backbone", ["llama", "subln"])
def test_gradients_of_every_parameter_are_those_of_finite_differences(name, backbone):
    moe = MoESpec(heads=2, experts=3, top_k=2, d_expert=3, every=1, router=name, d_shared=3, sub_token_residual=True)
    moe = moe.model_copy(update={"z_weight": 0.1, "balance_weight": 0.1})
    spec = ModelSpec(backbone=backbone, vocab_size=7, d_model=8, layers=1, attention_heads=2, moe=moe)
    model = Decoder(spec).double()
    init_weights(model, 3)
    token = torch.randint(7, (2, 6), generator=torch.Generator().manual_seed(0))

    def loss():
        output = model(token[:, :-1])
        return token_losses(output.logits_BTV, token[:, 1:]).double().mean() + routing_loss(spec, output.routing)

    def wide_loss():  # token_losses is float32 by design, too coarse for differences
        output = model(token[:, :-1])
        cross = F.cross_entropy(output.logits_BTV.flatten(0, 1), token[:, 1:].flatten())
        return cross + routing_loss(spec, output.routing)

    assert loss().item() == pytest.approx(wide_loss().item(), rel=1e-5)
    wide_loss().backward()
    for parameter_name, p in model.named_parameters():
        direction = torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(len(parameter_name)))
        slope, step = float((p.grad * direction).sum()), 1e-6
        with torch.no_grad():
            p.add_(direction, alpha=step)
            up = wide_loss().item()
            p.add_(direction, alpha=-2 * step)
            down = wide_loss().item()
            p.add_(direction, alpha=step)
        assert (up - down) / (2 * step) == pytest.approx(slope, rel=1e-4, abs=1e-7), parameter_name


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"router_dim": 4}, "router_dim would be ignored"),
        ({"router": "xmoe_torchscale", "router_dim": 4}, "router_dim would be ignored"),
        ({"second_expert": "random", "top_k": 1}, "it would be ignored at top_k 1"),
        ({"balance_choices": "all", "balance_weight": 0}, "balance_choices would be ignored"),
        ({"heads": 1, "projection_layers": 2}, "projection_layers would be ignored"),
        ({"normalize_gates": True, "top_k": 1}, "the router learns nothing"),
    ],
)
def test_an_option_that_would_be_ignored_is_an_error(fields, why):
    with pytest.raises(ValidationError, match=why):
        MoESpec(d_expert=4, **fields)


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("fields", [{}, {"capacity_factor": 1.0, "balance_choices": "all"}])
def test_no_shape_depends_on_where_rows_go_so_that_a_gpu_is_not_waited_for(name, fields):
    """The meta device has no values to wait for.

    It has no autocast either, which `forward` switches off, so `_route` is called.
    """
    found = router(router=name, bias_rate=0.1, **fields).to("meta")._route(rows().to("meta"), None)
    assert (found.count_E.shape, found.dropped.shape) == ((6,), ())
