"""Search for the width and number of experts that match a reference model, and comparison of two models."""

import math
from bisect import bisect_left
from collections.abc import Callable, Collection
from typing import Literal, NamedTuple

from pydantic import PositiveInt

from mhmoe_ray.errors import SpecError
from mhmoe_ray.planner.sizes import compute_sizes
from mhmoe_ray.spec import ModelSpec, RunSpec
from mhmoe_ray.spec.base import Section


class MatchSpec(Section):
    """Match of a model's experts with a reference: the quantity to match, and the rounding of the solution."""

    to: str
    """Name of the preset whose expert layers, on this model's own trunk (everything but `moe`), are the reference."""
    by: Literal["flops", "params", "both"]
    """Quantity to match. flops: the expert width is solved for equal multiply-adds per token, without those of the
    routers, as in arXiv 2404.15045 and arXiv 2411.16205. params: the expert width is solved for equal parameters. both:
    the width is solved for equal multiply-adds, then the number of experts for equal parameters."""
    # The default is 8, because rows of 8 values suit grouped matrix products and 8 experts divide over 2, 4 or 8 ranks.
    multiple: PositiveInt = 8
    """Number of which the expert width and the number of experts become multiples. If this rounding would change a
    value by more than 4 per cent, the value becomes a multiple of a half, a quarter or an eighth of this number. The
    number of experts is always a multiple of cluster.ep too. `mhmoe plan` shows the mismatch that remains."""


SOLVED_KEYS = {"flops": {"d_expert"}, "params": {"d_expert"}, "both": {"d_expert", "experts"}}
"""Keys of the `moe` section that a match solves for, by the value of `MatchSpec.by`."""

TOLERANCE = 0.04
"""Largest relative change of a value by rounding. For a larger one, a smaller multiple is tried."""
SEARCH_LIMIT = 1 << 20
"""Upper bound of the search, above any expert width or number of experts."""


def solve_match(
    model: ModelSpec, reference: ModelSpec, match: MatchSpec, fixed_keys: Collection[str] = (), ep: int = 1
) -> tuple[int, int]:
    """Return the expert width f and the number of experts E with which `model` matches a reference model.

    The match generalizes equations 8 and 9 of arXiv 2411.16205 to any layers and options. A number that it does not
    solve for, or whose key is in `fixed_keys`, keeps its value in `model`. `ep` divides E. A match without a solution
    is a SpecError.
    """
    moe = model.moe
    assert moe is not None
    width, experts = moe.d_expert, moe.experts
    if "d_expert" not in fixed_keys:
        count = _parameter_count if match.by == "params" else _macs_without_routers
        width = _solve_key("d_expert", model, count, count(reference), match, 1)
    # The number of experts changes only the multiply-adds of routers, and these do not count. So it can be solved after
    # the width without changing the multiply-adds that were matched.
    model = _replace_moe(model, d_expert=width)
    if match.by == "both" and "experts" not in fixed_keys:
        experts = _solve_key("experts", model, _parameter_count, _parameter_count(reference), match, ep)
        if experts < moe.top_k:
            reason = (
                f"equal parameters allow {experts} experts of width {width}, but each row needs {moe.top_k} of them"
            )
            raise SpecError(_match_label(match), reason, "lower model.moe.top_k, or match a larger reference")
    return width, experts


def matched_heads(plain: ModelSpec, heads: int, top_k: int | None = None) -> ModelSpec:
    """Return the multi-head counterpart of a plain mixture-of-experts model, matched in multiply-adds and parameters.

    By default `top_k` equals `heads`, as in arXiv 2411.16205. A width that does not split into `heads` equal parts and
    a match without a solution are SpecErrors.
    """
    assert plain.moe is not None
    if heads < 1 or plain.d_model % heads:
        raise SpecError(
            f"heads {heads}", f"a width of {plain.d_model} does not split into so many parts", "choose another number"
        )
    # `solve_match` replaces `experts` and `d_expert`, so these values are placeholders. They are chosen so that the
    # checks of the model accept any `top_k`.
    moe = plain.moe.model_copy(update={"heads": heads, "top_k": top_k or heads, "experts": SEARCH_LIMIT, "d_expert": 8})
    d_expert, experts = solve_match(plain.with_moe(moe), plain, MatchSpec(to="smoe", by="both"))
    return plain.with_moe(moe.model_copy(update={"d_expert": d_expert, "experts": experts}))


def experts_without_ep(spec: RunSpec) -> int | None:
    """Return the number of experts that would match the reference's parameters if cluster.ep did not have to divide it.

    The result is None without a reference with experts, and unless cluster.ep prevents the match: the spec's number is
    the multiple of cluster.ep that matches best, but it differs from the exact number by more than `TOLERANCE`.
    """
    model, reference, ep = spec.model, spec.reference_model, spec.cluster.ep
    if ep == 1 or model.moe is None or reference is None or reference.moe is None:
        return None
    target = _parameter_count(reference)

    def parameter_count(experts: int) -> int:
        return _parameter_count(_replace_moe(model, experts=experts))

    exact = _nearest_value(parameter_count, target, 1)
    is_closest_multiple = max(ep, _nearest_value(parameter_count, target, ep)) == model.moe.experts
    return exact if exact and is_closest_multiple and abs(model.moe.experts / exact - 1) > TOLERANCE else None


def _solve_key(
    key: str, model: ModelSpec, count: Callable[[ModelSpec], int], target: int, match: MatchSpec, divisor: int
) -> int:
    """Return the rounded value of the key `key` of `moe` at which `count` of the model is nearest to `target`.

    It is a multiple of `divisor`, and of `match.multiple` or the largest half, quarter or eighth of it with which
    rounding stays within `TOLERANCE`.
    """

    def count_at(value: int) -> int:
        return count(_replace_moe(model, **{key: value}))

    if count_at(0) >= target:
        reason = f"the parts besides the experts (projections, shared expert) have as much as {match.to} already"
        remedy = "match a larger reference, or lower model.moe.d_shared, d_sub_token or projection_layers"
        raise SpecError(_match_label(match), reason, remedy)
    exact = max(1, _nearest_value(count_at, target, 1))
    parts = [match.multiple // part for part in (1, 2, 4, 8) if match.multiple % part == 0]
    steps = sorted({math.lcm(part, divisor) for part in parts}, reverse=True)
    candidates = [_nearest_value(count_at, target, step) for step in steps]
    return next((value for value in candidates if abs(value / exact - 1) <= TOLERANCE), max(candidates[-1], steps[-1]))


def _nearest_value(count_at: Callable[[int], int], target: int, step: int) -> int:
    """Return the multiple of `step` at which `count_at`, which must not decrease, is nearest to the target."""
    # The value is searched by bisection, because a count does not always grow linearly with it.
    upper_index = bisect_left(range(SEARCH_LIMIT), target, key=lambda n: count_at(n * step))
    return step * min(max(0, upper_index - 1), upper_index, key=lambda n: abs(count_at(n * step) - target))


def _match_label(match: MatchSpec) -> str:
    return f"match to {match.to} by {match.by}"


def _replace_moe(model: ModelSpec, **moe: int) -> ModelSpec:
    assert model.moe is not None
    return model.model_copy(update={"moe": model.moe.model_copy(update=moe)})


def _macs_without_routers(model: ModelSpec) -> int:
    counts = compute_sizes(model)
    return counts.macs_per_token - counts.router_macs_per_token


def _parameter_count(model: ModelSpec) -> int:
    return compute_sizes(model).parameters


class CountComparison(NamedTuple):
    """Comparison of one count, such as parameters, between a model and its reference model."""

    model_value: int
    reference: int

    @property
    def ratio(self) -> float:
        return self.model_value / self.reference

    def as_json(self) -> dict[str, float]:
        """Return both counts and their ratio as `mhmoe plan --json` prints them."""
        return {"own": self.model_value, "reference": self.reference, "ratio": self.ratio}


def compare_models(model: ModelSpec, reference: ModelSpec) -> dict[str, CountComparison]:
    """Return comparisons of a model with its reference by name, without counts that are 0 in the reference.

    Equal parameters do not imply equal compute, and neither implies equal memory traffic of hidden activations.
    """
    counts, reference_counts = _compared_counts(model), _compared_counts(reference)
    return {
        name: CountComparison(count, reference_counts[name]) for name, count in counts.items() if reference_counts[name]
    }


def _compared_counts(model: ModelSpec) -> dict[str, int]:
    counts = compute_sizes(model)
    return {
        "parameters": counts.parameters,
        "active parameters": counts.active_parameters,
        "multiply-adds per token": counts.macs_per_token,
        # The papers on MH-MoE (arXiv 2404.15045 and 2411.16205) compare expert layers without routers.
        "multiply-adds of expert layers": counts.moe_macs_per_token - counts.router_macs_per_token,
        "hidden activations per token": counts.hidden_per_token,
    }
