"""A run's numbers and routes, as figures and tables take them."""

import json
import math
import statistics
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from mhmoe_ray.errors import RunError
from mhmoe_ray.evaluate import activation
from mhmoe_ray.evaluate.request import Evaluation, all_stored
from mhmoe_ray.planner.sizes import Sizes, flops_per_token, sizes
from mhmoe_ray.runs import events, history, metrics
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.spec import RunSpec


@dataclass(frozen=True)
class RunFigures:
    run: RunDir
    spec: RunSpec
    lines: list[dict[str, Any]]
    """Of metrics.jsonl, one a step, in order."""

    @classmethod
    def read(cls, run: RunDir) -> "RunFigures":
        """Raises:
        RunError: it was imported, not trained.
        """
        if run.is_imported:
            why = "it was imported, not trained here, so it has no numbers"
            raise RunError(f"run {run.id}", why, "leave it out")
        return cls(run, run.spec(), history.read(run))

    @cached_property
    def sizes(self) -> Sizes:
        return sizes(self.spec.model)

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        """On held-out text, the newest last; texts of users' own differ."""
        return [e for e in all_stored(self.run) if e.request.prepared]

    @cached_property
    def happened(self) -> list[dict[str, Any]]:
        """Its events."""
        return events.events(self.run)

    @property
    def held_out(self) -> str:
        """What its losses are of: the tokens of the held-out text and their entropy, where preparing told them."""
        told = events.newest(self.happened, "prepared") or {}
        return f"{self.spec.data.prepared} {told.get('validation_tokens')} {told.get('unigram_entropy')}"

    @property
    def validations(self) -> dict[int, float]:
        """Loss in nats per token by step, where it is finite."""
        found = {line[metrics.STEP]: line.get(metrics.VAL_LOSS) for line in self.lines}
        return {step: loss for step, loss in found.items() if loss is not None and math.isfinite(loss)}

    @property
    def steps(self) -> int:
        """Done."""
        return int(self.lines[-1][metrics.STEP]) if self.lines else 0

    @property
    def is_finished(self) -> bool:
        return self.steps >= self.spec.train.steps

    @property
    def has_given_up(self) -> bool:
        """It is over, and did not get to its last step."""
        return not self.is_finished and events.is_over(events.state(self.happened))

    @property
    def is_diverged(self) -> bool:
        """Its last validation was not finite."""
        validated = [line for line in self.lines if metrics.VAL_LOSS in line]
        return bool(validated) and validated[-1][metrics.STEP] not in self.validations

    @property
    def tokens_per_s(self) -> float | None:
        """Median over the steps; the first ones after a start, which are slow, do not move it."""
        speeds = [line[metrics.TOKENS_PER_S] for line in self.lines]
        return statistics.median(speeds) if speeds else None

    def late(self, name: str) -> float | None:
        """Mean of a metric over the last tenth of the steps."""
        values = [line[name] for line in self.lines[-max(1, len(self.lines) // 10) :] if line.get(name) is not None]
        return statistics.fmean(values) if values else None

    @property
    def seconds(self) -> float:
        """From the first to the last line of each start of its workers: not while it lay stopped."""
        of_group: dict[int, list[float]] = {}
        for line in self.lines:
            of_group.setdefault(line[metrics.GROUP], []).append(line[metrics.TIME])
        return sum(times[-1] - times[0] for times in of_group.values())

    def flops(self, tokens: float) -> float:
        """That training on so many takes: all matrix products of forward and backward, as `mhmoe plan` counts them."""
        return tokens * flops_per_token(self.spec.model, self.spec.data.seq_len).training


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
