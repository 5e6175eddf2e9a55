"""Tests of routers with a top-k and weights for each task, and of V-MoE's noise and losses."""

import pytest
import torch
from pydantic import ValidationError

from mhmoe_ray.families.vision.router import TaskRouter
from mhmoe_ray.model.router import Router, RoutingContext
from mhmoe_ray.model.router.balance import importance_load_loss
from mhmoe_ray.spec import MoESpec

ROWS = [12, 20]


def task_router(is_shared=False, factors=(1, 1), **fields):
    """Return a float64 router for two tasks and rows of width 8; `fields` are keys of MoESpec."""
    moe = MoESpec(**{"experts": 6, "top_k": 2, "d_expert": 4, **fields})
    router = TaskRouter(8, moe, dict(zip("ab", factors, strict=True)), is_shared=is_shared)
    for i, p in enumerate(router.parameters()):
        torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(i))
    return router.double()


def rows(seed=0):
    return torch.randn(sum(ROWS), 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def router_of(router, task):
    """Return a plain router with the weights of one task."""
    plain = Router(8, router.moe).double()
    source = router.scores if hasattr(router, "scores") else router.tasks[f"task_{task}"]
    plain.scores.load_state_dict(source.state_dict())
    return plain


@pytest.mark.parametrize("is_shared", [False, True])
def test_the_balance_loss_of_a_task_is_multiplied_by_its_factor(is_shared):
    router, x = task_router(is_shared, factors=(2, 0.5)), rows()
    losses = [router_of(router, task)(part).balance_loss for task, part in (("a", x[:12]), ("b", x[12:]))]
    shares = [12 / 32, 20 / 32] if is_shared else [1, 1]
    expected = 2 * shares[0] * losses[0] + 0.5 * shares[1] * losses[1]
    torch.testing.assert_close(router(x, context=RoutingContext(group_rows=ROWS)).balance_loss, expected)


@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("normalized", [False, True])
def test_a_task_is_routed_as_by_a_router_of_its_own_with_its_number_of_experts(is_shared, normalized):
    router, x = task_router(is_shared, normalize_gates=normalized), rows()
    router.top_k = [1, 3] if not normalized else [2, 3]
    routing = router(x, context=RoutingContext(group_rows=ROWS))
    assert routing.expert_NK.shape == (32, 3)
    counts = torch.zeros(6, dtype=torch.int64)
    for task, part, k in zip("ab", (slice(0, 12), slice(12, 32)), router.top_k, strict=True):
        plain = router_of(router, task)
        plain.moe = router.moe.model_copy(update={"top_k": k})
        expected = plain(x[part])
        assert torch.equal(routing.expert_NK[part, :k], expected.expert_NK)
        torch.testing.assert_close(routing.gate_NK[part, :k], expected.gate_NK)
        assert not routing.gate_NK[part, k:].any()
        counts += expected.count_E
    assert torch.equal(routing.count_E, counts)
    assert routing.dropped_routes == 0


def test_equal_numbers_of_experts_are_routed_as_by_a_plain_router():
    router, x = task_router(is_shared=True), rows()
    routing, expected = router(x, context=RoutingContext(group_rows=ROWS)), router_of(router, "a")(x)
    for value, expected_value in zip(routing[:-1], expected[:-1], strict=True):
        torch.testing.assert_close(value, expected_value)


def test_the_balance_loss_of_task_routers_is_the_sum_over_tasks():
    router, x = task_router(), rows()
    router.top_k = [1, 2]
    parts = {"a": (x[:12], 1), "b": (x[12:], 2)}
    losses = []
    for task, (part, k) in parts.items():
        plain = router_of(router, task)
        plain.moe = router.moe.model_copy(update={"top_k": k})
        losses.append(plain(part).balance_loss)
    torch.testing.assert_close(router(x, context=RoutingContext(group_rows=ROWS)).balance_loss, sum(losses))


def test_a_kernel_with_one_loss_for_all_rows_is_not_used_with_weights_for_each_task(monkeypatch):
    """The fused routing of GPUs would compute another load balancing loss than the sum over tasks."""
    monkeypatch.setattr("mhmoe_ray.model.router.top_k.can_fuse_routing", lambda *_: True)
    fused_calls = []
    monkeypatch.setattr(
        "mhmoe_ray.model.router.top_k.fused_routing", lambda *args, **_: fused_calls.append(args) or [None] * 6
    )
    task_router()(rows(), context=RoutingContext(group_rows=ROWS))
    assert not fused_calls
    task_router(is_shared=True)(rows(), context=RoutingContext(group_rows=ROWS))
    assert len(fused_calls) == 1


def test_capacity_follows_the_number_of_experts_of_each_task():
    router, x = task_router(capacity_factor=1.0), rows()
    router.top_k = [1, 2]
    # ceil(rows / experts) * top-k of each task: ceil(12 / 6) * 1 + ceil(20 / 6) * 2
    assert router(x, context=RoutingContext(group_rows=ROWS)).capacity == 2 + 8
    router.eval()
    assert router(x, context=RoutingContext(group_rows=ROWS)).capacity is None


def test_a_task_without_rows_changes_nothing():
    router, x = task_router(), rows()
    routing = router(x, context=RoutingContext(group_rows=[32, 0]))
    expected = router_of(router, "a")(x)
    torch.testing.assert_close(routing.balance_loss, expected.balance_loss)
    assert torch.equal(routing.expert_NK, expected.expert_NK)


def test_noise_has_the_deviation_of_the_spec_divided_by_the_number_of_experts():
    moe = MoESpec(experts=6, top_k=2, d_expert=4, noise=3.0)
    router = Router(8, moe).double()
    torch.nn.init.zeros_(router.scores.weight_ED)
    x = rows().repeat(625, 1)
    # Without noise all logits are equal. With noise, the mean squared log-sum-exp tells the deviation of the logits.
    normals = torch.randn(20_000, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    logits = normals * 3 / 6
    expected = logits.logsumexp(-1).square().mean()
    noisy_loss = router(x, torch.Generator().manual_seed(0)).z_loss.detach()
    assert float(noisy_loss) == pytest.approx(float(expected), rel=0.01)
    torch.testing.assert_close(router(x).z_loss, torch.tensor(6.0, dtype=torch.float64).log().square())


def test_load_is_the_probability_of_being_chosen_if_own_noise_is_drawn_again():
    """V-MoE's load agrees with a simulation that draws the noise of one logit again and keeps that of all others."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(5, 4, dtype=torch.float64, generator=generator)
    noisy = clean + 0.5 * torch.randn(5, 4, dtype=torch.float64, generator=generator)
    threshold = noisy.topk(2).values[:, -1:]
    draws = clean + 0.5 * torch.randn(200_000, 5, 4, dtype=torch.float64, generator=generator)
    load = (draws > threshold).double().mean(0).mean(0)
    importance = clean.softmax(-1).sum(0)
    expected = sum(float(v.var(correction=0) / v.mean() ** 2) for v in (load, importance))
    assert float(importance_load_loss(clean.softmax(-1), clean, noisy, 2, 0.5)) == pytest.approx(expected, rel=0.02)


def test_importance_and_load_lower_the_use_of_a_favoured_expert():
    moe = MoESpec(experts=4, top_k=1, d_expert=4, noise=1.0, balance="importance_load")
    router = Router(8, moe)
    torch.nn.init.normal_(router.scores.weight_ED, generator=torch.Generator().manual_seed(1))
    x = torch.randn(256, 8, generator=torch.Generator().manual_seed(2)) + 1
    optimizer = torch.optim.Adam(router.parameters(), lr=0.02)
    first_counts = router(x).count_E
    for step in range(200):
        optimizer.zero_grad()
        router(x, torch.Generator().manual_seed(step)).balance_loss.backward()
        optimizer.step()
    assert router(x).count_E.max() < 100 < first_counts.max()


def test_importance_and_load_need_noise():
    with pytest.raises(ValidationError, match="set noise"):
        MoESpec(experts=4, d_expert=4, balance="importance_load")
