"""Variants, which group runs that differ only in their seed; a sweep as a table; and verdicts on two variants."""

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, NamedTuple

from mhmoe_ray.errors import DataError
from mhmoe_ray.planner.sizes import Sizes, sizes
from mhmoe_ray.report.figures import RunFigures
from mhmoe_ray.runs import events, metrics
from mhmoe_ray.runs.sweeps import SweepDir
from mhmoe_ray.spec import ELSEWHERE, RunSpec, SweepRun
from mhmoe_ray.spec.sweep import unseeded

_FREE = ELSEWHERE | {"name", "storage", "seed", "origin", "reference"}
"""Sections and keys of a spec that do not change what is trained."""


class Losses(NamedTuple):
    """Validation losses of two variants that are compared."""

    baseline: list[float]
    other: list[float]
    paired: bool
    """Whether the losses are paired by seed.

    They are if the variants have two or more seeds in common, or if one of them has no other seeds; then only the
    common seeds count.
    """

    @property
    def differences(self) -> list[float]:
        """Losses of the other variant minus the baseline's: seed by seed if paired, else minus the baseline's mean."""
        if self.paired:
            return [b - a for a, b in zip(self.baseline, self.other, strict=True)]
        return [b - statistics.fmean(self.baseline) for b in self.other]


@dataclass(frozen=True)
class Variant:
    name: str
    runs: list[RunFigures]
    repeated: tuple[RunFigures, ...] = ()
    """Older runs with the seeds of `runs`, which do not count."""

    def losses(self, step: int) -> dict[int, float]:
        """Return the validation losses at a step, by seed."""
        return {r.spec.seed: r.validations[step] for r in self.runs if step in r.validations}

    def mean_loss(self, step: int) -> float | None:
        return _mean(self.losses(step).values())

    def deviation(self, step: int) -> float | None:
        """Return the sample standard deviation of the losses over the seeds; None with fewer than two seeds."""
        found = list(self.losses(step).values())
        return statistics.stdev(found) if len(found) > 1 else None

    def perplexity(self, step: int) -> float | None:
        """Return the perplexity of the mean loss."""
        return metrics.perplexity(self.mean_loss(step))

    def late(self, metric: str) -> float | None:
        """Return the mean of `RunFigures.late` over the runs that have the metric."""
        return _mean(run.late(metric) for run in self.runs)

    @property
    def tokens_per_s(self) -> float | None:
        return _mean(run.tokens_per_s for run in self.runs)

    @property
    def first(self) -> RunFigures:
        return self.runs[0]

    @property
    def counted(self) -> RunFigures:
        """First run whose routes were counted on held-out text, else the first run."""
        return next((run for run in self.runs if any(e.routing for e in run.evaluations)), self.first)


def row(variant: Variant, of: Sizes, beside: Sizes, step: int | None) -> dict[str, Any]:
    """Return the columns that all tables of variants share.

    Args:
        variant: the variant, which may have no runs yet.
        of: the sizes of its model.
        beside: the sizes of the model that ratios are relative to.
        step: the step at which losses are compared; None if there is none yet.
    """
    return {
        "parameters": of.parameters,
        "parameters_ratio": of.parameters / beside.parameters,
        "macs_per_token": of.macs_per_token,
        "macs_ratio": of.macs_per_token / beside.macs_per_token,
        "loss": variant.mean_loss(step) if step else None,
        "deviation": variant.deviation(step) if step else None,
        "perplexity": variant.perplexity(step) if step else None,
        "balance": variant.late(metrics.BALANCE),
        "dropped": variant.late(metrics.DROPPED),
        "tokens_per_s": variant.tokens_per_s,
    }


def losses_at(step: int, baseline: Variant, other: Variant) -> Losses | None:
    """Return the losses of two variants at a step; None if one of them has no loss there."""
    a, b = baseline.losses(step), other.losses(step)
    if not a or not b:
        return None
    common = sorted(a.keys() & b.keys())
    if len(common) > 1 or len(common) == min(len(a), len(b)):
        return Losses([a[seed] for seed in common], [b[seed] for seed in common], paired=True)
    return Losses(list(a.values()), list(b.values()), paired=False)


def variants(runs: Sequence[RunFigures]) -> list[Variant]:
    """Group runs into variants, in the order in which these first appear.

    If a variant has finished runs, only those count; of several runs with one seed, only the newest counts. Runs of the
    same training with different names are separate variants if they are distributed in different ways, for example by
    another strategy, because then the ways are compared.
    """
    found: dict[str, list[RunFigures]] = {}
    for run in runs:
        found.setdefault(f"{_what_is_trained(run.spec)} {run.held_out}", []).append(run)
    apart = [same for trained in found.values() for same in _where_trained(trained)]
    names = _short([unseeded(same[0].spec.name) for same in apart])
    counted = [[run for run in same if run.is_finished] or same for same in apart]
    return [_of_one_run_a_seed(name, same) for name, same in zip(names, counted, strict=True)]


def matched_step(compared: Sequence[Variant]) -> int | None:
    """Return the last step that all runs with a validation have validated; None if there is none."""
    validated = [set(run.validations) for variant in compared for run in variant.runs if run.validations]
    return max(set.intersection(*validated), default=None) if validated else None


def _of_one_run_a_seed(name: str, same: Sequence[RunFigures]) -> Variant:
    """Return a variant with the newest run of each seed, in the order in which the seeds first appear.

    Two runs with the same seed are not a sample of two.
    """
    found: dict[int, RunFigures] = {}
    for run in same:
        if run.run.created() >= found.setdefault(run.spec.seed, run).run.created():
            found[run.spec.seed] = run
    newest = list(found.values())
    return Variant(name, newest, tuple(run for run in same if run not in newest))


def _mean(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return statistics.fmean(found) if found else None


def _what_is_trained(spec: RunSpec) -> str:
    return json.dumps(spec.model_dump(mode="json", exclude=_FREE), sort_keys=True)


def _where_trained(same: Sequence[RunFigures]) -> Iterable[list[RunFigures]]:
    """Split runs of the same training by name, if the names stand for different ways to distribute it."""
    found: dict[str, list[RunFigures]] = {}
    for run in same:
        found.setdefault(unseeded(run.spec.name), []).append(run)
    ways = [{(c.strategy, c.ep, c.dispatch) for c in (run.spec.cluster for run in named)} for named in found.values()]
    return found.values() if any(way != ways[0] for way in ways) else [list(same)]


def _short(names: Sequence[str]) -> list[str]:
    """Return the names without the words that all of them begin with; equal results get a number."""
    words = [name.split("-") for name in names]
    common = len(list(takewhile(lambda same: len(set(same)) == 1, zip(*words, strict=False)))) if len(names) > 1 else 0
    cut = ["-".join(parts[common:]) or name for parts, name in zip(words, names, strict=True)]
    return [name if cut.count(name) == 1 else f"{name} ({cut[:i].count(name) + 1})" for i, name in enumerate(cut)]


CONFIDENCE = 0.95


class Verdict(NamedTuple):
    """Result of comparing two variants: the difference of validation losses, in nats per token.

    The difference is the other's loss minus the baseline's.
    """

    baseline: str
    other: str
    step: int
    difference: float
    low: float | None
    """Lower end of the interval that holds the true difference with probability CONFIDENCE; None with one seed.

    The interval is by Student's t.
    """
    high: float | None
    seeds: int
    """Number of seeds of the variant with fewer."""
    paired: bool
    """Whether differences were taken seed by seed, over the seeds that both variants have."""

    @property
    def is_clear(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    @property
    def said(self) -> str:
        """Sentence that states the result."""
        word = "lower" if self.difference < 0 else "higher"
        figures = f"{abs(self.difference):.4f} nats {word}"
        if (ratio := metrics.perplexity(self.difference)) is not None:
            figures += f", perplexity {100 * abs(ratio - 1):.1f}% {word}"
        if self.low is None:
            return f"{self.other} to {self.baseline}: {figures}; one seed, so nobody knows how sure that is"
        how = f"{self.seeds} seeds{', paired' if self.paired else ''}"
        interval = f"{CONFIDENCE:.0%} interval {self.low:+.4f} to {self.high:+.4f}, {how}"
        if self.is_clear:
            return f"{self.other} to {self.baseline}: {figures} ({interval})"
        return f"{self.other} to {self.baseline}: not told apart; {figures} ({interval})"


def verdict(baseline: Variant, other: Variant, step: int) -> Verdict | None:
    """Compare a variant with the baseline.

    Args:
        baseline: the baseline.
        other: the other variant.
        step: a step at which both were validated.

    Returns:
        The verdict; None if one of them has no loss at that step.

    Raises:
        DataError: scipy is not installed.
    """
    losses = losses_at(step, baseline, other)
    if losses is None:
        return None
    seeds = min(len(losses.baseline), len(losses.other))
    low, high = _interval(losses) if seeds > 1 else (None, None)
    difference = statistics.fmean(losses.differences)
    return Verdict(baseline.name, other.name, step, difference, low, high, seeds, losses.paired)


def _interval(losses: Losses) -> tuple[float, float]:
    """Return the confidence interval of the mean difference: Student's for paired losses, else Welch's."""
    try:
        from scipy import stats
    except ImportError as e:
        raise DataError("intervals", "scipy is missing", "pip install 'mhmoe-ray[report]'") from e
    a, b = losses.baseline, losses.other
    test = stats.ttest_rel(b, a) if losses.paired else stats.ttest_ind(b, a, equal_var=False)
    interval = test.confidence_interval(CONFIDENCE)
    return float(interval.low), float(interval.high)


def table(place: SweepDir) -> list[dict[str, Any]]:
    """Return the table of a sweep as JSON: one object per variant, in the order of the sweep.

    Losses are those of finished runs or, while no run is finished, of all runs, at the last step that all of them have
    validated. Runs whose last validation loss is not finite do not count. Ratios are to the first variant.
    """
    wanted = set(place.order(place.orders()[-1]).wanted)
    figures = {name: RunFigures.read(run) for name, run in place.runs().items() if run.attempts_file.exists()}
    compared = {name for name, run in figures.items() if not run.is_diverged}
    compared = {name for name in compared if figures[name].is_finished} or compared
    found = []
    for variant_name, same in _by_variant(e for e in place.entries() if e.name in figures or e.name in wanted).items():
        states = Counter(_state(figures.get(entry.name)) for entry in same)
        variant = Variant(variant_name, [figures[e.name] for e in same if e.name in compared])
        started = next((figures[e.name].spec for e in same if e.name in figures), same[0].spec)
        found.append((started, states, variant))
    step = matched_step([variant for _, _, variant in found if variant.runs])
    first = sizes(found[0][0].model)
    return [
        {
            "variant": variant.name,
            "states": dict(states),
            "step": step,
            "losses": variant.losses(step) if step else {},
            **row(variant, sizes(spec.model), first, step),
        }
        for spec, states, variant in found
    ]


def _by_variant(entries: Iterable[SweepRun]) -> dict[str, list[SweepRun]]:
    found: dict[str, list[SweepRun]] = {}
    for entry in entries:
        found.setdefault(entry.variant, []).append(entry)
    return found


def _state(run: RunFigures | None) -> str:
    if run is None:
        return "queued"
    said = events.state(events.events(run.run))
    return f"{said}, diverged" if run.is_diverged else said
