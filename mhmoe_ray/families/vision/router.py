"""Routers of vision models, which may have weights for each task (AdaMV-MoE, ICCV 2023)."""

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import cast

import torch
from torch import Tensor, nn

from mhmoe_ray.model.router import Router, RoutingContext
from mhmoe_ray.model.router.balance import RoutedLogits
from mhmoe_ray.model.router.base import BaseScores, Scores
from mhmoe_ray.model.router.groups import SplitScores
from mhmoe_ray.model.router.table import build_scores
from mhmoe_ray.model.router.top_k import TopK
from mhmoe_ray.spec import ModelSpec, MoESpec
from mhmoe_ray.spec.vision import module_key


class TaskRouter(Router):
    """Router of one layer. Each task may have its own weights and its own number of experts per row.

    `tasks` are in the order of their rows, which share the expert capacity. If tasks have their own weights, the load
    balancing loss is the sum of one loss for each task. Otherwise it is one loss for all rows or, if the tasks choose
    different numbers of experts, the mean of the tasks' losses, weighted by their numbers of rows. `tasks` has the
    factor of each task's loss; factors other than 1 have the same effect as different numbers of experts.
    """

    def __init__(self, width: int, moe: MoESpec, tasks: Mapping[str, float], *, is_shared: bool) -> None:
        # The constructor of the base class calls `_build_scores`, which needs these attributes.
        self._tasks, self._is_shared = dict(tasks), is_shared
        super().__init__(width, moe)
        self.top_k = [moe.top_k for _ in tasks]
        """Number of experts that a row of each task chooses."""

    def _build_scores(self, width: int) -> None:
        if self._is_shared:
            super()._build_scores(width)
        else:
            self.tasks = nn.ModuleDict({module_key(name): build_scores(width, self.moe) for name in self._tasks})

    def _scores_of(self, group_rows: Sequence[int]) -> Scores:
        if self._is_shared:
            return self.scores
        return SplitScores(cast("list[BaseScores]", [*self.tasks.values()]), group_rows)

    def _is_plain(self, generator: torch.Generator | None) -> bool:
        # The fused kernel computes one load balancing loss over all rows, not one for each task.
        return self._has_one_loss and super()._is_plain(generator)

    def _top_k_of(self, group_rows: Sequence[int], device: torch.device) -> TopK:
        if len(set(self.top_k)) == 1:
            return TopK(self.top_k[0])
        count_N = torch.tensor(self.top_k, device=device).repeat_interleave(torch.tensor(group_rows, device=device))
        return TopK(max(self.top_k), count_N)

    def _capacity(self, group_rows: Sequence[int], rows: int) -> int | None:
        capacities = [self.moe.expert_capacity(n, k) for n, k in zip(group_rows, self.top_k, strict=True)]
        return None if self.moe.capacity_factor is None else sum(filter(None, capacities))

    @property
    def _has_one_loss(self) -> bool:
        return self._is_shared and len(set(self.top_k)) == 1 and set(self._tasks.values()) == {1}

    def _balance_loss(self, routed: RoutedLogits, context: RoutingContext) -> Tensor:
        if self._has_one_loss:
            return super()._balance_loss(routed, context)
        group_rows = context.group_rows
        ends = accumulate(group_rows, initial=0)
        losses = [
            factor * super(TaskRouter, self)._balance_loss(routed.slice(start, stop, k), context)
            for (start, stop), k, factor in zip(pairwise(ends), self.top_k, self._tasks.values(), strict=True)
            if stop > start
        ]
        if self._is_shared:
            # A shared router has one loss: the mean of the tasks' losses, weighted by their numbers of rows.
            losses = [loss * n / sum(group_rows) for loss, n in zip(losses, filter(None, group_rows), strict=True)]
        return torch.stack(losses).sum()


def build_router(spec: ModelSpec) -> Router:
    """Return the router of one layer."""
    assert spec.vision is not None
    assert spec.moe is not None
    factors = {name: task.rate_ratio for name, task in spec.vision.tasks.items()}
    return TaskRouter(spec.row_width, spec.moe, factors, is_shared=spec.vision.routers == "shared")
