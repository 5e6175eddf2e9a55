"""Layers of equal cost, random routes, and the bytes that they send between nodes."""

from typing import NamedTuple

import torch
from torch import Tensor

from mhmoe_ray.bench.steps import SMALL_SIZE, matched_models
from mhmoe_ray.spec import ClusterSpec, ModelSpec

NODES = ("a", "a", "b", "b")
"""Name of the simulated node of each rank."""
DISPATCHES = ("flat", "hierarchical")
# Bytes of one value of a row, which is sent in bfloat16.
VALUE_BYTES = 2
# Bytes of one gate (float32), one expert id (int32) and one count (int64).
GATE_BYTES, ID_BYTES, COUNT_BYTES = 4, 4, 8


def layer_models() -> dict[str, ModelSpec]:
    """Return the models to compare by name, all with the same multiply-adds and parameters.

    They are plain layers with finer and finer experts, and the multi-head layers with which arXiv 2411.16205 would
    compare them, at half the width of that paper's models.
    """
    models = {name: spec.model for name, spec in matched_models(SMALL_SIZE, [2, 3]).items()}
    plain_model = models.pop("SMoE")
    assert plain_model.moe is not None
    plain_models = {"SMoE": plain_model}
    for factor in (2, 8):
        shape = {"experts": 8 * factor, "top_k": factor, "d_expert": plain_model.moe.d_expert // factor}
        plain_models[f"fine-grained x {factor}"] = plain_model.with_moe(plain_model.moe.model_copy(update=shape))
    return plain_models | models


def cluster_spec(dispatch: str) -> ClusterSpec:
    """Return the spec of a cluster with one expert-parallel group over both nodes."""
    return ClusterSpec.model_validate({"workers": len(NODES), "ep": len(NODES), "dispatch": dispatch})


class Routes(NamedTuple):
    """Uniformly random experts for the rows of one rank, and the gates of these choices."""

    expert_NK: Tensor
    gate_NK: Tensor

    @staticmethod
    def draw(model: ModelSpec, tokens: int, rank: int) -> "Routes":
        """Return random routes for the rows of `tokens` tokens; the rank is the seed."""
        moe = model.moe
        assert moe is not None
        generator = torch.Generator().manual_seed(rank)
        score, expert_NK = torch.rand(tokens * moe.heads, moe.experts, generator=generator).topk(moe.top_k)
        return Routes(expert_NK, score.softmax(-1))


class ExpectedBytes(NamedTuple):
    """Bytes that each dispatch sends between nodes in a forward and backward pass, summed over all ranks."""

    flat: int
    hierarchical: int


def expected_bytes(model: ModelSpec, tokens: int) -> ExpectedBytes:
    """Return the bytes that each dispatch must send between nodes for the routes of `Routes.draw`.

    Each rank has `tokens` tokens. Flat dispatch sends rows, outputs and the gradients of both once for each route to an
    expert on another node. Hierarchical dispatch sends them once for each other node that has experts of the row, and
    adds the expert ids and, in both directions, the gates. Both also send counts of rows.
    """
    moe = model.moe
    assert moe is not None
    ranks, k = len(NODES), moe.top_k
    routes = rows = 0
    for rank, node in enumerate(NODES):
        owner_rank_NK = Routes.draw(model, tokens, rank).expert_NK // (moe.experts // ranks)
        is_remote_NK = torch.tensor([owner_node != node for owner_node in NODES])[owner_rank_NK]
        routes += int(is_remote_NK.sum())
        rows += int(is_remote_NK.any(1).sum())  # hierarchical dispatch sends a row to the other node once
    # The factor 4 stands for a row, its output and the gradients of both.
    row_bytes = 4 * VALUE_BYTES * model.row_width
    rank_pairs = sum(a != b for a in NODES for b in NODES)  # ordered pairs of ranks on different nodes
    return ExpectedBytes(
        routes * row_bytes + rank_pairs * moe.experts // ranks * COUNT_BYTES,
        rows * (row_bytes + k * (2 * GATE_BYTES + ID_BYTES)) + ranks * 2 * COUNT_BYTES,
    )
