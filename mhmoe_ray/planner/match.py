"""Expert width and count that equal a reference in compute, in parameters or in both; and the comparison with it."""

import math
from bisect import bisect_left
from collections.abc import Callable, Collection
from typing import Literal, NamedTuple

from pydantic import PositiveInt

from mhmoe_ray.errors import SpecError
from mhmoe_ray.planner.sizes import sizes
from mhmoe_ray.spec import ModelSpec, RunSpec
from mhmoe_ray.spec.base import Section


class MatchSpec(Section):
    to: str
    """Name of the preset whose expert layers are the reference, on this model's own trunk."""
    by: Literal["flops", "params", "both"]
    """flops: the width that gives equal multiply-adds per token, the routers' left out as in both papers. params: the
    width that gives equal parameters. both: the width by multiply-adds, then the number of experts by parameters."""
    multiple: PositiveInt = 8
    """Width and count are rounded to multiples of this: rows of 8 values suit grouped matrix products, 8 experts divide
    over 2, 4 or 8 ranks. Where that would miss by more than 4 per cent, to a half, a quarter or an eighth of it. The
    count is a multiple of cluster.ep too, in any case. What mismatch remains, `plan` shows."""


SOLVED = {"flops": {"d_expert"}, "params": {"d_expert"}, "both": {"d_expert", "experts"}}
"""Keys of the `moe` section that are not given but found."""

TOLERANCE = 0.04
"""By how much rounding may miss before it takes smaller steps."""
MOST = 1 << 20
"""More than any width or number of experts."""


def solve(
    model: ModelSpec, reference: ModelSpec, match: MatchSpec, given: Collection[str] = (), ep: int = 1
) -> tuple[int, int]:
    """Expert width f and number of experts E of `model` (P2, equations 8 and 9, here for any layers and options).

    Args:
        model: what `match` solves is not looked at.
        reference: the model to equal.
        match: what to equal.
        given: keys of SOLVED that stay as `model` has them: of `both`, the other one is solved.
        ep: the number of experts is to be a multiple of this.

    Raises:
        SpecError: no width, or no number of experts, gets there.
    """
    moe = model.moe
    assert moe is not None
    width, experts = moe.d_expert, moe.experts
    if "d_expert" not in given:
        count = _parameters if match.by == "params" else _compute
        width = _solve_key("d_expert", model, count, count(reference), match, 1)
    model = _with(model, d_expert=width)
    if match.by == "both" and "experts" not in given:
        experts = _solve_key("experts", model, _parameters, _parameters(reference), match, ep)
        if experts < moe.top_k:
            why = f"equal parameters leave {experts} experts of width {width}, but rows go to {moe.top_k} each"
            raise SpecError(_what(match), why, "lower model.moe.top_k, or match a larger reference")
    return width, experts


def matched_heads(plain: ModelSpec, heads: int, top_k: int | None = None) -> ModelSpec:
    """A plain model's multi-head counterpart of as many multiply-adds and parameters.

    Args:
        plain: with experts of whole tokens.
        heads: h.
        top_k: of a sub-token; h by default, as in P2's models.

    Raises:
        SpecError: the width does not split into so many, or none matches.
    """
    assert plain.moe is not None
    if heads < 1 or plain.d_model % heads:
        raise SpecError(f"heads {heads}", f"{plain.d_model} does not split into so many parts", "choose others")
    moe = plain.moe.model_copy(update={"heads": heads, "top_k": top_k or heads, "experts": MOST, "d_expert": 8})
    d_expert, experts = solve(plain.with_moe(moe), plain, MatchSpec(to="smoe", by="both"))
    return plain.with_moe(moe.model_copy(update={"d_expert": d_expert, "experts": experts}))


def without_ep(spec: RunSpec) -> int | None:
    """The number of experts that equals the reference's parameters, where the spec has the nearest one that cluster.ep
    divides and it misses by more than rounding may; else None."""
    model, reference, ep = spec.model, spec.reference_model, spec.cluster.ep
    if ep == 1 or model.moe is None or reference is None or reference.moe is None:
        return None
    target = _parameters(reference)

    def counted(experts: int) -> int:
        return _parameters(_with(model, experts=experts))

    exact = _nearest(counted, target, 1)
    nearest = max(ep, _nearest(counted, target, ep)) == model.moe.experts
    return exact if exact and nearest and abs(model.moe.experts / exact - 1) > TOLERANCE else None


def _solve_key(
    key: str, model: ModelSpec, count: Callable[[ModelSpec], int], target: int, match: MatchSpec, divisor: int
) -> int:
    """The value whose count is nearest to the target, among multiples of the divisor and of what `match` says or a part
    of it."""

    def counted(value: int) -> int:
        return count(_with(model, **{key: value}))

    if counted(0) >= target:
        why = f"all but the experts (projections, shared expert) has as much as {match.to} already"
        fix = "match a larger reference, or lower model.moe.d_shared or projection_layers"
        raise SpecError(_what(match), why, fix)
    exact = max(1, _nearest(counted, target, 1))
    parts = [match.multiple // part for part in (1, 2, 4, 8) if match.multiple % part == 0]
    steps = sorted({math.lcm(part, divisor) for part in parts}, reverse=True)
    rounded = [_nearest(counted, target, step) for step in steps]
    return next((value for value in rounded if abs(value / exact - 1) <= TOLERANCE), max(rounded[-1], steps[-1]))


def _nearest(counted: Callable[[int], int], target: int, step: int) -> int:
    """Counts grow with the value, though not always in a line."""
    above = bisect_left(range(MOST), target, key=lambda n: counted(n * step))
    return step * min(max(0, above - 1), above, key=lambda n: abs(counted(n * step) - target))


def _what(match: MatchSpec) -> str:
    return f"match to {match.to} by {match.by}"


def _with(model: ModelSpec, **moe: int) -> ModelSpec:
    assert model.moe is not None
    return model.model_copy(update={"moe": model.moe.model_copy(update=moe)})


def _compute(model: ModelSpec) -> int:
    found = sizes(model)
    return found.macs_per_token - found.router_macs_per_token


def _parameters(model: ModelSpec) -> int:
    return sizes(model).parameters


class Comparison(NamedTuple):
    own: int
    reference: int

    @property
    def ratio(self) -> float:
        return self.own / self.reference


def parity(model: ModelSpec, reference: ModelSpec) -> dict[str, Comparison]:
    """By name; what the reference has none of is left out. Routers are not counted among the multiply-adds of expert
    layers, as in both papers. A claim at equal parameters is not one at equal compute,
    and neither says anything of the traffic of hidden activations."""
    ours, theirs = sizes(model), sizes(reference)
    found = {
        "parameters": Comparison(ours.parameters, theirs.parameters),
        "active parameters": Comparison(ours.active_parameters, theirs.active_parameters),
        "multiply-adds per token": Comparison(ours.macs_per_token, theirs.macs_per_token),
        "multiply-adds of expert layers": Comparison(
            ours.moe_macs_per_token - ours.router_macs_per_token,
            theirs.moe_macs_per_token - theirs.router_macs_per_token,
        ),
        "hidden activations per token": Comparison(ours.hidden_per_token, theirs.hidden_per_token),
    }
    return {name: comparison for name, comparison in found.items() if comparison.reference}
