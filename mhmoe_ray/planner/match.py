"""Expert width and count that equal a reference: in compute, in parameters, or in both."""

from bisect import bisect_left
from collections.abc import Callable
from typing import Literal

from pydantic import PositiveInt

from mhmoe_ray.errors import SpecError
from mhmoe_ray.planner.sizes import sizes
from mhmoe_ray.spec import ModelSpec
from mhmoe_ray.spec.base import Section


class MatchSpec(Section):
    to: str
    """Name of the preset whose expert layers are the reference, on this model's own trunk."""
    by: Literal["flops", "params", "both"]
    """flops: the width that gives equal multiply-adds per token, the routers' left out as in both papers. params: the
    width that gives equal parameters. both: the width by multiply-adds, then the number of experts by parameters."""
    multiple: PositiveInt = 8
    """Width and count are rounded to multiples of this: rows of 8 values suit grouped matrix products, 8 experts divide
    over 2, 4 or 8 ranks. The remaining mismatch is shown by `plan`."""


SOLVED = {"flops": {"d_expert"}, "params": {"d_expert"}, "both": {"d_expert", "experts"}}
"""Keys of the `moe` section that are not given but found."""

MOST = 1 << 20
"""More than any width or number of experts."""


def solve(model: ModelSpec, reference: ModelSpec, match: MatchSpec) -> tuple[int, int]:
    """Expert width f and number of experts E of `model` (P2, equations 8 and 9, here for any layers and options).

    Args:
        model: what `match` solves is not looked at.
        reference: the model to equal.
        match: what to equal.

    Raises:
        SpecError: no width, or no number of experts, gets there.
    """
    moe = model.moe
    assert moe is not None
    what = f"match to {match.to} by {match.by}"
    count = _parameters if match.by == "params" else _compute
    width = _nearest(lambda value: count(_with(model, d_expert=value)), count(reference), match.multiple)
    if width == 0:
        why = "what is not in experts (projections, shared expert) alone costs about as much"
        raise SpecError(what, why, "match a larger reference, or raise model.moe.experts")
    if match.by != "both":
        return width, moe.experts
    model = _with(model, d_expert=width)
    experts = _nearest(lambda value: _parameters(_with(model, experts=value)), _parameters(reference), match.multiple)
    if experts < moe.top_k:
        why = f"equal parameters leave {experts} experts of width {width}, but rows go to {moe.top_k} each"
        raise SpecError(what, why, "lower model.moe.top_k or match.multiple, or match a larger reference")
    return width, experts


def _nearest(count: Callable[[int], int], target: int, multiple: int) -> int:
    """The multiple whose count is nearest to the target; counts grow with the value, not always in a line."""
    above = bisect_left(range(MOST), target, key=lambda n: count(n * multiple))
    return multiple * min(max(0, above - 1), above, key=lambda n: abs(count(n * multiple) - target))


def _with(model: ModelSpec, **moe: int) -> ModelSpec:
    assert model.moe is not None
    return model.model_copy(update={"moe": model.moe.model_copy(update=moe)})


def _compute(model: ModelSpec) -> int:
    found = sizes(model)
    return found.macs_per_token - found.router_macs_per_token


def _parameters(model: ModelSpec) -> int:
    return sizes(model).parameters
