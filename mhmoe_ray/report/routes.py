"""A run's routes, from its newest evaluation on held-out text or else from its training."""

import json
from typing import NamedTuple

import numpy as np

from mhmoe_ray.evaluate import activation
from mhmoe_ray.report.figures import RunFigures


class Routes(NamedTuple):
    load: np.ndarray
    """(L, E): shares of a layer's routes, times E."""
    source: str
    """Where they were counted."""
    activated: list[float] | None
    """By activation.THRESHOLDS; from an evaluation alone."""
    activated_relative: list[float]
    """By activation.RELATIVE."""
    distinct: float | None
    """Mean number of different experts of a token, over its routes: 1 is all different."""
    agreement: float | None
    """Of different heads, mean over layers."""


def routes(figures: RunFigures) -> Routes | None:
    """None for a dense model, and for a run without checkpoints."""
    evaluated = [e for e in figures.evaluations if e.routing]
    if evaluated:
        whole = activation.joined(evaluated[-1].routing.values())
        agreement = activation.mean_agreement(whole)
        per_token = len(whole.distinct[0]) - 1
        return Routes(
            activation.load(whole.counts),
            f"{evaluated[-1].request.said}, step {evaluated[-1].step:,}",
            activation.activated(whole),
            activation.activated_relative(whole.counts),
            float(activation.distinct_experts(whole).mean()) / per_token,
            None if agreement is None else float(agreement.mean()),
        )
    run = figures.run
    counted = sorted(path.name for path in run.routing.glob("*.json")) if run.routing.exists() else []
    if not counted:
        return None
    found = json.loads((run.routing / counted[-1]).read_text())
    counts = found["routes_per_layer_and_expert"]
    if not counts:
        return None
    source = f"training text up to step {found['step']:,}"
    return Routes(activation.load(counts), source, None, activation.activated_relative(counts), None, None)


def compared_use(baseline: str, other: str, of_baseline: Routes, of_other: Routes) -> str | None:
    """A sentence on which of two variants has the larger share of its experts in use, threshold by threshold; None
    where one was not evaluated.

    Args:
        baseline, other: their names.
        of_baseline, of_other: their routes.
    """
    if of_baseline.activated is None or of_other.activated is None:
        return None
    pairs = zip(activation.THRESHOLDS, of_other.activated, of_baseline.activated, strict=True)
    above: list[str] = []
    below: list[str] = []
    for threshold, ours, theirs in pairs:
        if ours != theirs:
            (above if ours > theirs else below).append(f"{threshold:g} ({ours:.1%} to {theirs:.1%})")
    if not above and not below:
        return f"{other} has as many of its experts in use as {baseline} at every threshold"
    said = [f"more at {', '.join(above)}"] if above else []
    said += [f"fewer at {', '.join(below)}"] if below else []
    return f"{other} has, beside {baseline}, {' and '.join(said)} of its experts in use, and else as many"
