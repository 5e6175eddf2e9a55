"""Routers by name, and their sizes. Scores are computed by the module of a router's name in model/routers/.

Sizes are of E experts and rows of D values, which some project to Q values first.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

RouterName = Literal["linear", "xmoe", "xmoe_torchscale"]


class RouterSizes(NamedTuple):
    macs: int
    """Multiply-adds of a row."""
    parameters: int
    kept: int
    """Values that the backward needs of a row, beside logits and probabilities."""


def _linear(E: int, D: int, Q: int) -> RouterSizes:
    return RouterSizes(macs=D * E, parameters=D * E, kept=0)


def _xmoe(E: int, D: int, Q: int) -> RouterSizes:
    """Kept are cosines and probabilities once more, at the temperature of the balance loss."""
    return RouterSizes(macs=Q * (D + E), parameters=Q * (D + E) + 1, kept=2 * E + 4 * (Q + 1))


def _torchscale(E: int, D: int, Q: int) -> RouterSizes:
    return RouterSizes(macs=Q * (D + E), parameters=Q * (D + E), kept=Q)


ROUTERS: dict[RouterName, Callable[[int, int, int], RouterSizes]] = {
    "linear": _linear,
    "xmoe": _xmoe,
    "xmoe_torchscale": _torchscale,
}
