"""Tests of routers, of the load balancing loss, and of limited expert capacity."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.model.init import init_weights
from mhmoe_ray.model.loss import token_losses
from mhmoe_ray.model.noise import Noise
from mhmoe_ray.model.router import SCORES_BY_ROUTER, Router, RoutingContext
from mhmoe_ray.model.router.balance import switch_balance_loss, updated_bias, z_loss
from mhmoe_ray.model.router.top_k import capacity_mask
from mhmoe_ray.model.trunk import routing_loss
from mhmoe_ray.spec import ModelSpec, MoESpec
from mhmoe_ray.spec.moe import ROUTERS


def build_router(**fields):
    """Return a float64 router for rows of width 8, with random weights; `fields` are keys of MoESpec."""
    moe = MoESpec(**{"experts": 6, "top_k": 2, "d_expert": 4, **fields})
    module = Router(8, moe)
    for i, p in enumerate(module.parameters()):
        torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(i))
    if moe.router == "xmoe":
        torch.nn.init.constant_(module.scores.log_temperature, math.log(0.4 - 0.01))
    return module.double()


def random_rows(n=40, seed=0):
    return torch.randn(n, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_xmoe_router_computes_the_published_formula():
    r, x = build_router(router="xmoe", router_dim=5), random_rows()
    s = r.scores
    projected = x @ s.reduce_QD.T
    cosine = torch.stack([F.cosine_similarity(projected, e[None], dim=-1) for e in s.expert_EQ], dim=1)
    probability = (cosine / 0.4).softmax(-1)
    routing = r(x)
    assert torch.equal(routing.expert_NK, probability.topk(2).indices)
    torch.testing.assert_close(routing.gate_NK, probability.topk(2).values)
    # The load balancing loss divides by the initial temperature of 0.3, so that training cannot lower it by a change
    # of the learned temperature.
    expected_loss = switch_balance_loss((cosine / 0.3).softmax(-1), routing.expert_NK[:, :1])
    torch.testing.assert_close(routing.balance_loss, expected_loss)


def test_learned_temperature_stays_positive_when_training_lowers_it():
    r, x = build_router(router="xmoe"), random_rows()
    order = r.scores(x).argsort(dim=-1)
    optimizer = torch.optim.Adam([r.scores.log_temperature], lr=0.05)
    for _ in range(1000):
        optimizer.zero_grad()
        r.scores.temperature.backward()
        optimizer.step()
    assert 0.01 <= r.scores.temperature < 0.02
    assert torch.equal(r.scores(x).argsort(dim=-1), order)
    assert r.scores(x).abs().max() <= 100


@pytest.mark.parametrize("name", SCORES_BY_ROUTER)
def test_routing_is_float32_under_autocast_and_with_bfloat16_weights(name):
    r = build_router(router=name).bfloat16()
    wide = build_router(router=name).float()
    wide.load_state_dict({k: v.float() for k, v in r.state_dict().items()})
    x = random_rows(400).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        rounded, autocast = r(x), wide(x)
    for routing in (rounded, autocast):
        for tensor, expected in zip(routing[:-1], wide(x.float())[:-1], strict=True):
            assert torch.equal(tensor, expected)
            assert tensor.dtype == expected.dtype
    assert rounded.gate_NK.dtype == rounded.balance_loss.dtype == torch.float32


@pytest.mark.parametrize("name", SCORES_BY_ROUTER)
def test_normalised_gates_are_shares_of_the_chosen_probabilities(name):
    gates = build_router(router=name)(random_rows()).gate_NK
    torch.testing.assert_close(
        build_router(router=name, normalize_gates=True)(random_rows()).gate_NK, gates / gates.sum(-1)[:, None]
    )


def test_normalised_gates_are_finite_where_all_chosen_probabilities_underflow():
    r = build_router(normalize_gates=True, bias_rate=0.1).float()
    with torch.no_grad():
        r.scores.weight_ED.copy_(torch.tensor([0.0, -300, -301, 0, 0, 0])[:, None])
        r.bias_E.copy_(torch.tensor([0.0, 2, 2, 0, 0, 0]))
    x = torch.ones(3, 8, requires_grad=True)
    routing = r(x)
    assert set(routing.expert_NK[0].tolist()) == {1, 2}
    torch.testing.assert_close(routing.gate_NK.sum(-1), torch.ones(3))
    routing.gate_NK[:, 0].sum().backward()
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(r.scores.weight_ED.grad).all()


def test_torchscales_router_normalises_the_expert_side_only():
    r, x = build_router(router="xmoe_torchscale"), random_rows()
    unit = r.scores.expert_EQ / r.scores.expert_EQ.norm(dim=1, keepdim=True)
    assert unit.shape == (6, 16)
    probability = ((x @ r.scores.reduce_QD.T) @ unit.T).softmax(-1)
    torch.testing.assert_close(r(x).gate_NK, probability.topk(2).values)


@settings(max_examples=60)
@given(n=st.integers(0, 30), experts=st.integers(1, 6), data=st.data())
def test_capacity_mask_keeps_first_choices_first(n, experts, data):
    k = data.draw(st.integers(1, experts))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    expert_NK = torch.rand(n, experts, generator=g).topk(k, dim=-1).indices
    candidate_NK = torch.rand(n, k, generator=g) < 0.8
    capacity = data.draw(st.integers(0, 12))
    route_counts = [0] * experts
    expected = torch.zeros_like(candidate_NK)
    for choice in range(k):
        for row in range(n):
            e = int(expert_NK[row, choice])
            if candidate_NK[row, choice]:
                expected[row, choice] = route_counts[e] < capacity
                route_counts[e] += 1
    assert torch.equal(capacity_mask(expert_NK, candidate_NK, experts, capacity), expected)


def test_expert_capacity_equals_that_of_both_papers_code():
    def capacity(rows, experts, top_k, factor):
        return MoESpec(experts=experts, top_k=top_k, capacity_factor=factor, d_expert=1).expert_capacity(rows)

    assert capacity(rows=2048, experts=8, top_k=2, factor=1.0) == 2 * 256
    assert capacity(rows=100, experts=8, top_k=1, factor=1.0) == math.ceil(100 / 8)
    assert capacity(rows=100, experts=8, top_k=2, factor=0.5) == 13
    assert [capacity(rows=10 * n, experts=n, top_k=1, factor=1.1) for n in (1, 3, 7)] == [11, 11, 11]
    assert capacity(rows=100, experts=8, top_k=2, factor=None) is None


def test_table_names_the_routers_with_other_probabilities_for_the_balance():
    own_balance = {name for name, scores in SCORES_BY_ROUTER.items() if "balance_probabilities" in vars(scores)}
    assert own_balance == {name for name, traits in ROUTERS.items() if traits.has_own_balance}


@pytest.mark.parametrize("name", SCORES_BY_ROUTER)
def test_dropped_routes_have_no_weight_and_are_counted(name):
    r = build_router(router=name, capacity_factor=0.5)
    routing = r(random_rows(48))
    capacity = r.moe.expert_capacity(48)
    assert routing.count_E.max() <= capacity
    assert int(routing.dropped_routes) == int((routing.gate_NK == 0).sum()) == 96 - int(routing.count_E.sum()) > 0
    dropless_routing = build_router(router=name)(random_rows(48))
    assert int(dropless_routing.dropped_routes) == 0
    assert torch.equal(dropless_routing.gate_NK[routing.gate_NK > 0], routing.gate_NK[routing.gate_NK > 0])


def test_serving_drops_nothing():
    r = build_router(capacity_factor=0.5)
    assert int(r(random_rows(48)).dropped_routes) > 0
    dropless_routing, served_routing = build_router()(random_rows(48)), r.eval()(random_rows(48))
    assert served_routing.capacity is dropless_routing.capacity is None
    assert all(torch.equal(a, b) for a, b in zip(served_routing[:-1], dropless_routing[:-1], strict=True))


def test_random_second_choices_that_are_left_out_do_not_count_as_dropped():
    r, x = build_router(second_expert="random", normalize_gates=True), random_rows(400)
    dropless_routing = r(x, torch.Generator().manual_seed(0))
    assert int(dropless_routing.dropped_routes) == 0
    assert int(dropless_routing.count_E.sum()) < 2 * len(x)
    limited = build_router(second_expert="random", normalize_gates=True, capacity_factor=0.5)
    limited_routing = limited(x, torch.Generator().manual_seed(0))
    is_dropped = (dropless_routing.gate_NK > 0) & (limited_routing.gate_NK == 0)
    assert (
        int(limited_routing.dropped_routes)
        == int(is_dropped.sum())
        == int(dropless_routing.count_E.sum() - limited_routing.count_E.sum())
        > 0
    )


def test_random_second_experts_are_kept_as_often_as_their_weight_says_and_always_in_evaluation():
    r = build_router(second_expert="random", normalize_gates=True)
    x = random_rows(20_000)
    evaluation = r(x)
    assert int(evaluation.dropped_routes) == 0
    training = r(x, torch.Generator().manual_seed(0))
    is_kept = training.gate_NK[:, 1] > 0
    expected = (2 * evaluation.gate_NK[:, 1]).clamp(max=1).mean()
    assert abs(is_kept.double().mean().item() - expected.item()) < 0.02
    assert torch.equal(training.gate_NK[:, 0], evaluation.gate_NK[:, 0])


def test_jitter_is_off_without_noise_and_depends_on_micro_batch_and_layer():
    r, x, device = build_router(jitter=0.3), random_rows(), torch.device("cpu")
    exact_gates = r(x).gate_NK
    noisy_gates = [
        r(x, Noise(1, batch).generator(layer, device)).gate_NK for batch, layer in [(5, 0), (5, 0), (6, 0), (5, 1)]
    ]
    assert torch.equal(noisy_gates[0], noisy_gates[1])
    assert not any(torch.equal(noisy_gates[0], other_gates) for other_gates in [exact_gates, *noisy_gates[2:]])


def test_jitter_scales_inputs_of_the_scores_by_at_most_its_rate():
    r, inputs = build_router(jitter=0.3), []
    r.scores.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    r(torch.ones(500, 8, dtype=torch.float64), torch.Generator().manual_seed(0))
    [x_ND] = inputs
    assert 0.7 <= x_ND.min() < 0.71
    assert 1.29 < x_ND.max() <= 1.3
    assert x_ND.mean().item() == pytest.approx(1, abs=0.011)  # 0.011 is four standard errors of 4,000 uniform draws


def test_balance_loss_over_all_choices_and_z_loss_match_plain_formulas():
    p = random_rows(30).softmax(-1)
    chosen_experts = p.topk(3).indices
    share = [sum(int(e) == i for row in chosen_experts for e in row) / 90 for i in range(8)]
    expected = 8 * sum(float(p[:, i].mean()) * share[i] for i in range(8))
    assert switch_balance_loss(p, chosen_experts).item() == pytest.approx(expected)
    # The rows have different sums, so that the mean of their squares is not the square of their mean.
    logits = torch.tensor([[1.0, 1, 1, 1], [1, 2, 3, 10]]).log()
    assert z_loss(logits).item() == pytest.approx((math.log(4) ** 2 + math.log(16) ** 2) / 2)


def test_the_routing_loss_is_the_weighted_sum_of_both_losses_over_layers():
    moe = MoESpec(d_expert=4, every=1, balance_weight=0.3, z_weight=0.1)
    spec = ModelSpec(vocab_size=7, d_model=8, layers=2, attention_heads=2, moe=moe)
    routing = build_router()(random_rows())
    layers = [
        routing._replace(balance_loss=torch.tensor(balance), z_loss=torch.tensor(z))
        for balance, z in ((1.5, 0.25), (2.0, 4.0))
    ]
    assert routing_loss(spec, layers).item() == pytest.approx(0.3 * (1.5 + 2.0) + 0.1 * (0.25 + 4.0))


def test_sigmoid_scores_with_groups_equal_a_loop_over_rows():
    """The loop routes like DeepSeek-V3: it keeps the groups with the largest sums of their two best preferences, the
    scores plus biases, and then chooses the best experts in these groups."""
    r = build_router(
        experts=8,
        top_k=3,
        scoring="sigmoid",
        normalize_gates=True,
        gate_scale=2.5,
        groups=4,
        top_groups=2,
        bias_rate=0.1,
    )
    r.bias_E.copy_(torch.linspace(-0.3, 0.3, 8))
    x = random_rows(200)
    routing = r(x)
    for row in range(len(x)):
        score = (r.scores.weight_ED @ x[row]).sigmoid()
        preference = score + r.bias_E
        values = [preference[2 * g : 2 * g + 2].topk(2).values.sum() for g in range(4)]
        groups = sorted(range(4), key=lambda g: -values[g])[:2]
        candidates = [e for g in groups for e in (2 * g, 2 * g + 1)]
        chosen_experts = sorted(candidates, key=lambda e: -preference[e])[:3]
        assert routing.expert_NK[row].tolist() == chosen_experts
        gates = 2.5 * score[chosen_experts] / score[chosen_experts].sum()
        torch.testing.assert_close(routing.gate_NK[row], gates)
    kept_groups = {tuple(sorted({e // 2 for e in row})) for row in routing.expert_NK.tolist()}
    assert len(kept_groups) > 2
    assert all(len(groups) <= 2 for groups in kept_groups)


def test_groups_choose_like_transformers_deepseek():
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = DeepseekV3Config(
        hidden_size=16,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
        moe_intermediate_size=4,
        n_shared_experts=1,
    )
    deepseek_layer = DeepseekV3MoE(config).double()
    options = {"scoring": "sigmoid", "normalize_gates": True, "gate_scale": 2.5, "groups": 4, "top_groups": 2}
    our_router = build_router(experts=8, top_k=3, bias_rate=0.1, **options)
    x = random_rows(300)
    width = our_router.scores.weight_ED.shape[1]
    with torch.no_grad():
        deepseek_layer.gate.weight.zero_()[:, :width].copy_(our_router.scores.weight_ED)
        # In transformers, experts outside the chosen groups get the preference 0, so those of other experts must be
        # positive. A preference is a score plus a bias.
        deepseek_layer.gate.e_score_correction_bias.copy_(torch.linspace(0.0, 0.3, 8))
        our_router.bias_E.copy_(deepseek_layer.gate.e_score_correction_bias)
    expert_NK, gate_NK = _deepseek_routes(deepseek_layer, F.pad(x, (0, 16 - width)))
    routing = our_router(x)
    order = routing.expert_NK.argsort(1)
    their_order = expert_NK.argsort(1)
    assert torch.equal(routing.expert_NK.gather(1, order), expert_NK.gather(1, their_order))
    torch.testing.assert_close(routing.gate_NK.gather(1, order).float(), gate_NK.gather(1, their_order).float())


def _deepseek_routes(layer, x):
    """Return the experts and gates that transformers' DeepSeek-V3 layer chooses for rows."""
    result = layer.gate(x)
    if isinstance(result, torch.Tensor):
        result = layer.route_tokens_to_experts(result)
    expert_NK, gate_NK = (t for t in result if t.shape[-1] == 3)
    return (expert_NK, gate_NK) if not expert_NK.is_floating_point() else (gate_NK, expert_NK)


def test_balance_over_sequences_is_the_mean_of_each_sequence():
    x = random_rows(60)
    for choices in ("first", "all"):
        by_sequence = build_router(experts=4, top_k=2, balance_over="sequence", balance_choices=choices)
        plain = build_router(experts=4, top_k=2, balance_choices=choices)
        plain.load_state_dict(by_sequence.state_dict())
        expected = torch.stack([plain(part).balance_loss for part in x.chunk(5)]).mean()
        torch.testing.assert_close(by_sequence(x, context=RoutingContext(sequences=5)).balance_loss, expected)
        assert not torch.isclose(plain(x).balance_loss, expected, rtol=1e-3)


def test_balance_over_a_step_uses_the_given_shares():
    r = build_router(experts=4, top_k=2, balance_over="step", balance_choices="all")
    x = random_rows(60)
    assert r(x).balance_loss == 0
    r.share_E.copy_(torch.tensor([0.7, 0.1, 0.1, 0.1]))
    probability_NE = (x @ r.scores.weight_ED.T).softmax(-1)
    torch.testing.assert_close(r(x).balance_loss, 4 * (probability_NE.mean(0) * r.share_E).sum())


def test_selection_bias_balances_load_and_does_not_enter_gates():
    assert updated_bias(torch.zeros(3), torch.tensor([5, 1, 3]), 0.1).tolist() == pytest.approx([-0.1, 0.1, 0.0])
    r, x = build_router(bias_rate=0.002), random_rows(600)
    first_routing = r(x)
    for _ in range(300):
        r.bias_E.copy_(updated_bias(r.bias_E, r(x).count_E, 0.002))
    last_routing = r(x)
    assert last_routing.count_E.double().std() < 0.3 * first_routing.count_E.double().std()
    probability = (x @ r.scores.weight_ED.T).softmax(-1)
    torch.testing.assert_close(last_routing.gate_NK, probability.gather(1, last_routing.expert_NK))


@pytest.mark.parametrize("name", SCORES_BY_ROUTER)
@pytest.mark.parametrize("experts", [2, 3])
def test_a_router_of_few_experts_still_learns(name, experts):
    r = build_router(router=name, experts=experts, top_k=1)
    r(random_rows()).gate_NK.sum().backward()
    assert all(p.grad.abs().max() > 1e-6 for p in r.parameters())


@pytest.mark.parametrize("name", SCORES_BY_ROUTER)
@pytest.mark.parametrize("backbone", ["llama", "subln"])
def test_gradients_of_every_parameter_match_finite_differences(name, backbone):
    moe = MoESpec(heads=2, experts=3, top_k=2, d_expert=3, every=1, router=name, d_shared=3, sub_token_residual=True)
    moe = moe.model_copy(update={"z_weight": 0.1, "balance_weight": 0.1})
    spec = ModelSpec(backbone=backbone, vocab_size=7, d_model=8, layers=1, attention_heads=2, moe=moe)
    model = Decoder(spec).double()
    init_weights(model, 3)
    token = torch.randint(7, (2, 6), generator=torch.Generator().manual_seed(0))

    def loss():
        output = model(token[:, :-1])
        return token_losses(output.logits_BTV, token[:, 1:]).double().mean() + routing_loss(spec, output.routing)

    # token_losses computes in float32, which is too coarse for finite differences. This loss is computed in float64.
    def wide_loss():
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
            upper_loss = wide_loss().item()
            p.add_(direction, alpha=-2 * step)
            lower_loss = wide_loss().item()
            p.add_(direction, alpha=step)
        assert (upper_loss - lower_loss) / (2 * step) == pytest.approx(slope, rel=1e-4, abs=1e-7), parameter_name


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"router_dim": 4}, "router_dim would be ignored"),
        ({"router": "xmoe_torchscale", "router_dim": 4}, "router_dim would be ignored"),
        ({"second_expert": "random", "top_k": 1}, "it would be ignored at top_k 1"),
        ({"balance_choices": "all", "balance_weight": 0}, "balance_choices would be ignored"),
        ({"heads": 1, "projection_layers": 2}, "projection_layers would be ignored"),
        ({"normalize_gates": True, "top_k": 1}, "the router learns nothing"),
        ({"scoring": "sigmoid", "router": "xmoe"}, "router xmoe is defined with softmax"),
        ({"top_groups": 2}, "groups is 1, so top_groups would be ignored"),
        ({"experts": 8, "groups": 3}, r"experts \(8\) do not split into 3 equal groups"),
        ({"experts": 8, "groups": 2, "top_groups": 3}, "there are only 2 groups"),
        ({"experts": 8, "groups": 8, "top_groups": 1}, r"1 of 8 groups have fewer than top_k \(2\) experts"),
        ({"balance_over": "sequence", "balance_weight": 0}, "balance_over would be ignored"),
        ({"balance_over": "step"}, "set balance_choices to all"),
        ({"balance_over": "step", "balance_choices": "all", "capacity_factor": 1.0}, "no route may be dropped"),
    ],
)
def test_an_option_that_would_be_ignored_is_an_error(fields, reason):
    with pytest.raises(ValidationError, match=reason):
        MoESpec(d_expert=4, **fields)


@pytest.mark.parametrize("name", SCORES_BY_ROUTER)
@pytest.mark.parametrize("fields", [{}, {"capacity_factor": 1.0, "balance_choices": "all"}])
def test_routing_has_no_shape_that_depends_on_values(name, fields):
    """Routing runs on the meta device, which has no values, so on a GPU the host need not wait for results.

    The meta device has no autocast either, so `_route` is called instead of `forward`.
    """
    routing = build_router(router=name, bias_rate=0.1, **fields).to("meta")._route(random_rows().to("meta"), None)
    assert (routing.count_E.shape, routing.dropped_routes.shape) == ((6,), ())
