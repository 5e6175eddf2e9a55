"""Numbers and routes of a run, in the form that figures and tables need."""

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
    """Lines of metrics.jsonl, one per step, in order."""

    @classmethod
    def read(cls, run: RunDir) -> "RunFigures":
        """Read the numbers of a run.

        Raises:
            RunError: the run was imported, not trained.
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
        """Evaluations on the prepared held-out text, the newest last, without those on users' own texts, which
        differ."""
        return [e for e in all_stored(self.run) if e.request.prepared]

    @cached_property
    def happened(self) -> list[dict[str, Any]]:
        """Events of the run."""
        return events.events(self.run)

    @property
    def held_out(self) -> str:
        """Text that identifies the data of the run's validation losses.

        It names the folder of the prepared data and, if preparation recorded them, the number of held-out tokens and
        their unigram entropy.
        """
        told = events.newest(self.happened, "prepared") or {}
        return f"{self.spec.data.prepared} {told.get('validation_tokens')} {told.get('unigram_entropy')}"

    @property
    def validations(self) -> dict[int, float]:
        """Finite validation losses in nats per token, by step."""
        found = {line[metrics.STEP]: line.get(metrics.VAL_LOSS) for line in self.lines}
        return {step: loss for step, loss in found.items() if loss is not None and math.isfinite(loss)}

    @property
    def steps(self) -> int:
        """Number of steps done."""
        return int(self.lines[-1][metrics.STEP]) if self.lines else 0

    @property
    def is_finished(self) -> bool:
        return self.steps >= self.spec.train.steps

    @property
    def has_given_up(self) -> bool:
        """Whether the run is over without having reached its last step."""
        return not self.is_finished and events.is_over(events.state(self.happened))

    @property
    def is_diverged(self) -> bool:
        """Whether the last validation loss of the run was not finite."""
        validated = [line for line in self.lines if metrics.VAL_LOSS in line]
        return bool(validated) and validated[-1][metrics.STEP] not in self.validations

    @property
    def tokens_per_s(self) -> float | None:
        """Median throughput in tokens per second over the steps; None without steps.

        The slow first steps after a start do not move the median.
        """
        speeds = [line[metrics.TOKENS_PER_S] for line in self.lines]
        return statistics.median(speeds) if speeds else None

    def late(self, name: str) -> float | None:
        """Return the mean of a metric over the last tenth of the steps; None if none of them has it."""
        values = [line[name] for line in self.lines[-max(1, len(self.lines) // 10) :] if line.get(name) is not None]
        return statistics.fmean(values) if values else None

    @property
    def seconds(self) -> float:
        """Seconds of training: the sum, over worker groups, of the time from their first to their last line of metrics.

        The time for which the run was stopped does not count.
        """
        of_group: dict[int, list[float]] = {}
        for line in self.lines:
            of_group.setdefault(line[metrics.GROUP], []).append(line[metrics.TIME])
        return sum(times[-1] - times[0] for times in of_group.values())

    def flops(self, tokens: float) -> float:
        """Return the FLOPs of training on this number of tokens.

        They are those of all matrix products, forward and backward, as `mhmoe plan` counts them.
        """
        return tokens * flops_per_token(self.spec.model, self.spec.data.seq_len).training


class Routes(NamedTuple):
    load: np.ndarray
    """Share of each expert in its layer's routes, times E, shape (L, E)."""
    source: str
    """Description of the text on which routes were counted, with the step."""
    activated: list[float] | None
    """Share of activated experts for each of activation.THRESHOLDS; None without an evaluation of routing."""
    activated_relative: list[float]
    """Share of activated experts for each of activation.RELATIVE."""
    distinct: float | None
    """Mean number of different experts per token, divided by its number of routes: 1 means that all are different."""
    agreement: float | None
    """Mean agreement of different heads, over layers."""


def routes(figures: RunFigures) -> Routes | None:
    """Return the routes of a run: of the newest evaluation that counted them, else of the newest training counts.

    None for a dense model, and for a run that has neither.
    """
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
    """Return a sentence on which of two variants has the larger share of its experts in use, threshold by threshold.

    Args:
        baseline: the name of the baseline.
        other: the name of the other variant.
        of_baseline: the routes of the baseline.
        of_other: the routes of the other variant.

    Returns:
        The sentence; None if one of the variants was not evaluated.
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
