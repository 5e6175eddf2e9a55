"""Scores of E experts for rows, one class for each router of `spec.ROUTERS`.

base.py               what they have in common      linear.py    W x (both papers' equations)
xmoe.py               X-MoE's, as published         xmoe_torchscale.py    the same as coded, and used for P1
"""

from mhmoe_ray.model.routers.base import BaseScores
from mhmoe_ray.model.routers.linear import LinearScores
from mhmoe_ray.model.routers.xmoe import XMoEScores
from mhmoe_ray.model.routers.xmoe_torchscale import TorchscaleScores
from mhmoe_ray.spec import MoESpec
from mhmoe_ray.spec.model import RouterName

SCORES: dict[RouterName, type[BaseScores]] = {
    "linear": LinearScores,
    "xmoe": XMoEScores,
    "xmoe_torchscale": TorchscaleScores,
}


def scores(width: int, moe: MoESpec) -> BaseScores:
    """Those that the spec names, for rows of a width; not initialised."""
    return SCORES[moe.router](width, moe)
