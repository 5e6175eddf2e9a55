"""Layers of one cost, the routes drawn for them, and the bytes that these routes must bring from node to node."""

from typing import NamedTuple

import torch
from torch import Tensor

from mhmoe_ray.bench.steps import SMALL, matched_models
from mhmoe_ray.spec import ClusterSpec, ModelSpec

NODES = ("a", "a", "b", "b")
"""Of the ranks."""
DISPATCHES = ("flat", "hierarchical")
ROW_VALUE = 2  # bytes of bfloat16
GATE, ID, COUNT = 4, 4, 8  # bytes of a gate in float32, of an expert's number and of a count as they travel


def layers() -> dict[str, ModelSpec]:
    """Plain layers of the same multiply-adds and parameters with ever finer experts, and the multi-head ones that the
    follow-up paper would put beside them, at half its width."""
    models = {name: spec.model for name, spec in matched_models(SMALL, [2, 3]).items()}
    plain = models.pop("SMoE")
    assert plain.moe is not None
    found = {"SMoE": plain}
    for times in (2, 8):
        shape = {"experts": 8 * times, "top_k": times, "d_expert": plain.moe.d_expert // times}
        found[f"fine-grained x {times}"] = plain.with_moe(plain.moe.model_copy(update=shape))
    return found | models


def spread(dispatch: str) -> ClusterSpec:
    """One expert-parallel group over both nodes."""
    return ClusterSpec.model_validate({"workers": len(NODES), "ep": len(NODES), "dispatch": dispatch})


class Routes(NamedTuple):
    """Of one rank's rows; experts are drawn uniformly."""

    expert_NK: Tensor
    gate_NK: Tensor

    @staticmethod
    def draw(model: ModelSpec, tokens: int, rank: int) -> "Routes":
        moe = model.moe
        assert moe is not None
        g = torch.Generator().manual_seed(rank)
        score, expert_NK = torch.rand(tokens * moe.heads, moe.experts, generator=g).topk(moe.top_k)
        return Routes(expert_NK, score.softmax(-1))


class Expected(NamedTuple):
    """Bytes from node to node for a forward and backward pass, of all ranks and both ways."""

    flat: int
    hierarchical: int


def expected(model: ModelSpec, tokens: int) -> Expected:
    """By the routes alone: rows, outputs, and the gradients of both. Flat, each once for each route of an expert on
    another node; hierarchical, once for each other node, with gates both ways and the numbers of experts."""
    moe = model.moe
    assert moe is not None
    ranks, k = len(NODES), moe.top_k
    routes = rows = 0
    for rank, node in enumerate(NODES):
        owner_NK = Routes.draw(model, tokens, rank).expert_NK // (moe.experts // ranks)
        elsewhere_NK = torch.tensor([other != node for other in NODES])[owner_NK]
        routes += int(elsewhere_NK.sum())
        rows += int(elsewhere_NK.any(1).sum())  # there is one other node
    row = 4 * ROW_VALUE * model.d_model // moe.heads
    pairs = sum(a != b for a in NODES for b in NODES)  # of ranks that are on different nodes
    return Expected(
        routes * row + pairs * moe.experts // ranks * COUNT,
        rows * (row + k * (2 * GATE + ID)) + ranks * 2 * COUNT,
    )
