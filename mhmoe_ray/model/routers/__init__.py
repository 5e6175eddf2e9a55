"""Scores of E experts for rows, one file for each router of `spec/model.py`, with a class `Scores` of that base.

base.py               what they have in common      linear.py    W x (both papers' equations)
xmoe.py               X-MoE's, as published         xmoe_torchscale.py    the same as coded, and used for P1
"""

from importlib import import_module

from mhmoe_ray.model.routers.base import BaseScores
from mhmoe_ray.spec import MoESpec


def scores(width: int, moe: MoESpec) -> BaseScores:
    """Those that the spec names, for rows of a width; not initialised."""
    made: BaseScores = import_module(f"{__name__}.{moe.router}").Scores(width, moe)
    return made
