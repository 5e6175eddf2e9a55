"""Expert width and number of experts that match a reference in compute, in parameters or in both; and the comparison
with it."""

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
    """Name of the preset whose expert layers are the reference, placed on this model's own trunk (everything but
    `moe`)."""
    by: Literal["flops", "params", "both"]
    """Quantity to match. flops: the expert width that gives equal multiply-adds per token, without those of the
    routers, as in both papers. params: the expert width that gives equal parameters. both: the width by multiply-adds,
    then the number of experts by parameters."""
    multiple: PositiveInt = 8
    """Expert width and number of experts are rounded to multiples of this: rows of 8 values suit grouped matrix
    products, and 8 experts divide over 2, 4 or 8 ranks. Where rounding would miss by more than 4 per cent, the step is
    a half, a quarter or an eighth of it. The number of experts is always a multiple of cluster.ep too. `plan` shows the
    mismatch that remains."""


SOLVED = {"flops": {"d_expert"}, "params": {"d_expert"}, "both": {"d_expert", "experts"}}
"""Keys of the `moe` section that are solved instead of given, by `MatchSpec.by`."""

TOLERANCE = 0.04
"""Largest relative error of rounding; beyond it, rounding takes a smaller step."""
MOST = 1 << 20
"""Upper bound of the search, above any expert width or number of experts."""


def solve(
    model: ModelSpec, reference: ModelSpec, match: MatchSpec, given: Collection[str] = (), ep: int = 1
) -> tuple[int, int]:
    """Return the expert width f and the number of experts E of `model` that match a reference (P2, equations 8 and 9,
    here for any layers and options).

    Args:
        model: the model to solve for; its values of the keys to be solved are ignored.
        reference: the model to match.
        match: what to match, and how to round.
        given: keys of SOLVED that keep their value in `model`; with `by: both`, the other key is still solved.
        ep: the number of experts must be a multiple of this.

    Raises:
        SpecError: no width, or no number of experts, matches the reference.
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
    """Return the multi-head counterpart of a plain mixture-of-experts model, with matched multiply-adds and parameters.

    Args:
        plain: a model whose experts see whole tokens.
        heads: h, the number of sub-tokens per token.
        top_k: number of experts per sub-token; by default h, as in P2's models.

    Raises:
        SpecError: the model's width does not split into `heads` equal parts, or no width or number of experts matches.
    """
    assert plain.moe is not None
    if heads < 1 or plain.d_model % heads:
        raise SpecError(f"heads {heads}", f"{plain.d_model} does not split into so many parts", "choose others")
    moe = plain.moe.model_copy(update={"heads": heads, "top_k": top_k or heads, "experts": MOST, "d_expert": 8})
    d_expert, experts = solve(plain.with_moe(moe), plain, MatchSpec(to="smoe", by="both"))
    return plain.with_moe(moe.model_copy(update={"d_expert": d_expert, "experts": experts}))


def without_ep(spec: RunSpec) -> int | None:
    """Return the number of experts that would match the reference's parameters if cluster.ep did not have to divide it.

    It is returned only if the spec has the nearest number that cluster.ep divides, and that misses the match by more
    than `TOLERANCE`; otherwise the result is None.
    """
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
    """Return the value of a `moe` key whose count is nearest to the target.

    It is a multiple of the divisor and of `match.multiple`, or of a half, a quarter or an eighth of that.

    Raises:
        SpecError: everything but the experts already reaches the target.
    """

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
    """Return the multiple of `step` whose count is nearest to the target, by bisection: counts grow with the value,
    though not always linearly."""
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
    """Return the comparisons of a model with its reference by name, without those where the reference has 0.

    Multiply-adds of expert layers do not include the routers, as in both papers. Equal parameters do not imply equal
    compute, and neither implies equal traffic of hidden activations.
    """
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
