"""The table of modules that compute a router's logits, by the name of the router."""

from pkgutil import resolve_name

from mhmoe_ray.model.router.base import BaseScores
from mhmoe_ray.spec import MoESpec
from mhmoe_ray.spec.moe import ROUTERS

SCORES_BY_ROUTER: dict[str, type[BaseScores]] = {
    name: resolve_name(traits.scores) for name, traits in ROUTERS.items() if traits.scores is not None
}


def build_scores(width: int, moe: MoESpec) -> BaseScores:
    """Return the uninitialized module of logits of router `moe.router`, for rows of width `width`."""
    return SCORES_BY_ROUTER[moe.router](width, moe)
