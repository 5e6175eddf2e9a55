"""Logits of rows in groups with separate weights, such as those of modalities or of tasks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mhmoe_ray.model.router.base import BaseScores


class SplitScores:
    """Callable that computes router logits, with a separate module for each group of rows."""

    def __init__(self, scores: Sequence[BaseScores], group_rows: Sequence[int]) -> None:
        self._scores, self._group_rows = scores, list(group_rows)

    def __call__(self, x_ND: Tensor) -> Tensor:
        groups = torch.split(x_ND, self._group_rows)
        return torch.cat([scores(x) for scores, x in zip(self._scores, groups, strict=True)])

    def balance_probabilities(self, x_ND: Tensor, probability_NE: Tensor) -> Tensor:
        groups = zip(*(torch.split(t, self._group_rows) for t in (x_ND, probability_NE)), strict=True)
        return torch.cat(
            [scores.balance_probabilities(*group) for scores, group in zip(self._scores, groups, strict=True)]
        )
