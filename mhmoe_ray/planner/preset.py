"""What a preset is: a whole model with its training recipe, under a name."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from mhmoe_ray.planner.match import MatchSpec

Tree = dict[str, Any]
"""A section as a spec file writes it."""


class Preset(NamedTuple):
    about: str
    """What it is and where it comes from, in one line."""
    trunk: Mapping[str, Any]
    """The `model` section without `moe`."""
    moe: Callable[[Mapping[str, Any]], Tree] | None
    """The `moe` section on a trunk, which may be another model's; None: it is dense."""
    reference: str | None
    """Name of the preset whose expert layers it is compared with, on the same trunk."""
    train: Mapping[str, Any]
    """Its part of the `train` section."""
    seq_len: int
    match: MatchSpec | None = None
    """Where set, `d_expert` and `experts` come from it."""


def fixed(**moe: Any) -> Callable[[Mapping[str, Any]], Tree]:
    """Expert layers that are the same on any trunk."""
    return lambda _: dict(moe)


def rhythm(steps: int) -> Tree:
    """How often a run of so many steps validates and saves: about sixty times."""
    every = max(100, steps // 60)
    return {"validate_every": every, "checkpoint_every": every}
