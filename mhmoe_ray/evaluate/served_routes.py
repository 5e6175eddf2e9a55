"""Comparison of the experts that a server reports with those of the model's forward pass in training's code."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mhmoe_kernels import widen
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.model.router import Router

NEAR_TIE = 1e-4
"""Margin between a row's last chosen and first rejected expert up to which rounding may decide the choice."""


class ServedRoutes(NamedTuple):
    """Token ids of an answer, and the experts of each token by layer, as a server reports them."""

    token_ids: Sequence[int]
    experts: Sequence[Sequence[Sequence[int]]]


class RouteAgreement(NamedTuple):
    """Numbers of rows, which are sub-tokens, of one layer."""

    rows: int
    near_ties: int
    """Rows whose margin is at most `NEAR_TIE`."""
    different_near_ties: int
    different_rows: int
    """Rows that choose other experts although their margin is larger."""


@torch.inference_mode()
def compare_routes(model: Decoder, answers: Iterable[ServedRoutes]) -> list[RouteAgreement]:
    """Compute the routes of all answers, and return how many rows of each layer chose the same set of experts."""
    moe, layers = model.spec.moe, list(model.moe_layers())
    assert moe is not None
    margins: list[Tensor] = []

    def record_margin(router: Router, inputs: tuple[Tensor, ...]) -> None:
        _, preference_NE = router.preferences(router.scores(widen(inputs[0])))
        best_NK = preference_NE.topk(min(moe.top_k + 1, moe.experts), dim=-1).values
        has_choice = moe.top_k < moe.experts
        margins.append(best_NK[:, -2] - best_NK[:, -1] if has_choice else torch.full((len(best_NK),), torch.inf))

    hooks = [layer.router.register_forward_pre_hook(record_margin) for layer in layers]
    counts_LC = torch.zeros(len(layers), len(RouteAgreement._fields), dtype=torch.long)
    try:
        for answer in answers:
            margins.clear()
            routing = model(torch.tensor([answer.token_ids])).routing
            served_TLK = torch.tensor(answer.experts)
            for layer, margin_N in enumerate(margins):
                expert_NK = routing[layer].expert_NK
                served_NK = served_TLK[:, layer].reshape(expert_NK.shape)
                is_different = (served_NK.sort(-1).values != expert_NK.sort(-1).values).any(-1)
                is_near = margin_N <= NEAR_TIE
                masks = (torch.ones_like(is_near), is_near, is_near & is_different, is_different & ~is_near)
                counts_LC[layer] += torch.stack([mask.sum() for mask in masks])
    finally:
        for hook in hooks:
            hook.remove()
    return [RouteAgreement(*counts) for counts in counts_LC.tolist()]
