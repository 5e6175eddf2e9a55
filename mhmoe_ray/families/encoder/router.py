"""Routers of encoders."""

from collections.abc import Sequence

from mhmoe_ray.model.moe import build_plain_router
from mhmoe_ray.model.router import BaseRouter, Router
from mhmoe_ray.model.router.base import Scores
from mhmoe_ray.model.router.groups import SplitScores
from mhmoe_ray.model.router.table import build_scores
from mhmoe_ray.spec import ModelSpec


class ModalityRouter(Router):
    """Router of one layer with separate weights for patches and for tokens.

    Their rows go together through the choice of experts, the expert capacity and the load balancing loss.
    """

    def _build_scores(self, width: int) -> None:
        self.image, self.text = build_scores(width, self.moe), build_scores(width, self.moe)

    def _scores_of(self, group_rows: Sequence[int]) -> Scores:
        return SplitScores([self.image, self.text], group_rows)


def build_router(spec: ModelSpec) -> BaseRouter:
    """Return the router of one layer, which may have weights for each modality."""
    assert spec.encoder is not None
    assert spec.moe is not None
    if spec.encoder.routers == "per_modality":
        return ModalityRouter(spec.row_width, spec.moe)
    return build_plain_router(spec)
