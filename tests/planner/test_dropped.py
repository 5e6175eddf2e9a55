"""The share of routes that static routing drops by chance, against all possible choices and against the router's own
rule."""

import itertools

import pytest
import torch

from mhmoe_ray.model.router import fits
from mhmoe_ray.planner.expert_step import dropped_by_chance
from mhmoe_ray.spec import MoESpec


def moe(experts, top_k, capacity_factor):
    return MoESpec(experts=experts, top_k=top_k, d_expert=8, capacity_factor=capacity_factor)


def dropped(experts, top_k, places, expert_NK):
    chosen_NK = torch.as_tensor(expert_NK)
    return 1 - fits(chosen_NK, torch.ones_like(chosen_NK, dtype=torch.bool), experts, places).float().mean().item()


@pytest.mark.parametrize(
    ("experts", "top_k", "rows", "factor"), [(4, 1, 5, 1.0), (3, 2, 5, 0.5), (4, 2, 4, 1.0), (3, 3, 4, 0.5)]
)
def test_the_share_is_the_mean_over_all_choices(experts, top_k, rows, factor):
    spec = moe(experts, top_k, factor)
    choices = itertools.product(itertools.combinations(range(experts), top_k), repeat=rows)
    shares = [dropped(experts, top_k, spec.places(rows), choice) for choice in choices]
    assert dropped_by_chance(spec, rows) == pytest.approx(sum(shares) / len(shares), abs=1e-6)
    assert dropped_by_chance(spec, rows) > 0


@pytest.mark.parametrize(("experts", "top_k", "factor"), [(64, 2, 1.0), (256, 2, 1.0), (8, 1, 0.25)])
def test_the_share_is_what_rows_that_choose_at_random_lose(experts, top_k, factor):
    spec, rows = moe(experts, top_k, factor), 1024
    drawn = torch.Generator().manual_seed(0)
    shares = [
        dropped(experts, top_k, spec.places(rows), torch.rand(rows, experts, generator=drawn).topk(top_k).indices)
        for _ in range(50)
    ]
    assert dropped_by_chance(spec, rows) == pytest.approx(sum(shares) / 50, abs=0.004)


def test_far_more_rows_than_places_lose_what_is_left():
    assert dropped_by_chance(moe(4, 1, 0.01), 1_000_000) == pytest.approx(0.99)


def test_dropless_routing_and_places_for_all_lose_nothing():
    assert dropped_by_chance(moe(4, 2, None), 100) == dropped_by_chance(moe(4, 2, 2.0), 100) == 0
