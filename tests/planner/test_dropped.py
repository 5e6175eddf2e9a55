"""Tests of the expected share of dropped routes, against the router's own rule for all choices or for random ones."""

import itertools

import pytest
import torch

from mhmoe_ray.model.router.top_k import capacity_mask
from mhmoe_ray.planner.expert_step import expected_drop_share
from mhmoe_ray.spec import MoESpec


def moe(experts, top_k, capacity_factor):
    return MoESpec(experts=experts, top_k=top_k, d_expert=8, capacity_factor=capacity_factor)


def dropped_share(experts, top_k, capacity, expert_NK):
    """Return the share of routes that the router drops for the choices `expert_NK`."""
    expert_tensor = torch.as_tensor(expert_NK)
    return (
        1
        - capacity_mask(expert_tensor, torch.ones_like(expert_tensor, dtype=torch.bool), experts, capacity)
        .float()
        .mean()
        .item()
    )


@pytest.mark.parametrize(
    ("experts", "top_k", "rows", "factor"), [(4, 1, 5, 1.0), (3, 2, 5, 0.5), (4, 2, 4, 1.0), (3, 3, 4, 0.5)]
)
def test_the_share_is_the_mean_over_all_choices(experts, top_k, rows, factor):
    spec = moe(experts, top_k, factor)
    choices = itertools.product(itertools.combinations(range(experts), top_k), repeat=rows)
    shares = [dropped_share(experts, top_k, spec.expert_capacity(rows), choice) for choice in choices]
    assert expected_drop_share(spec, rows) == pytest.approx(sum(shares) / len(shares), abs=1e-6)
    assert expected_drop_share(spec, rows) > 0


@pytest.mark.parametrize(("experts", "top_k", "factor"), [(64, 2, 1.0), (256, 2, 1.0), (8, 1, 0.25)])
def test_the_share_is_that_of_random_choices(experts, top_k, factor):
    spec, rows = moe(experts, top_k, factor), 1024
    generator = torch.Generator().manual_seed(0)
    shares = [
        dropped_share(
            experts,
            top_k,
            spec.expert_capacity(rows),
            torch.rand(rows, experts, generator=generator).topk(top_k).indices,
        )
        for _ in range(50)
    ]
    assert expected_drop_share(spec, rows) == pytest.approx(sum(shares) / 50, abs=0.004)


def test_rows_far_beyond_the_capacity_are_dropped():
    assert expected_drop_share(moe(4, 1, 0.01), 1_000_000) == pytest.approx(0.99)


def test_dropless_routing_and_sufficient_capacity_drop_nothing():
    assert expected_drop_share(moe(4, 2, None), 100) == expected_drop_share(moe(4, 2, 2.0), 100) == 0
