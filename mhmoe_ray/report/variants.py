"""Variants: runs that differ in their seed alone, as one; a sweep as a table; and which of two variants is better."""

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
"""Sections and keys that do not change what is trained."""


class Losses(NamedTuple):
    """Of two variants, to be held against each other."""

    baseline: list[float]
    other: list[float]
    paired: bool
    """They are of the same seeds one by one: of those that both have, where these are two or more, or all that one of
    them has."""

    @property
    def differences(self) -> list[float]:
        """The other's less the baseline's: seed by seed, else less their mean."""
        if self.paired:
            return [b - a for a, b in zip(self.baseline, self.other, strict=True)]
        return [b - statistics.fmean(self.baseline) for b in self.other]


@dataclass(frozen=True)
class Variant:
    name: str
    runs: list[RunFigures]
    repeated: tuple[RunFigures, ...] = ()
    """Older runs of their seeds, which do not count."""

    def losses(self, step: int) -> dict[int, float]:
        """Validation loss at a step, by seed."""
        return {r.spec.seed: r.validations[step] for r in self.runs if step in r.validations}

    def mean_loss(self, step: int) -> float | None:
        return _mean(self.losses(step).values())

    def deviation(self, step: int) -> float | None:
        """Sample standard deviation over the seeds; None with fewer than two."""
        found = list(self.losses(step).values())
        return statistics.stdev(found) if len(found) > 1 else None

    def perplexity(self, step: int) -> float | None:
        """Of the mean loss."""
        return metrics.perplexity(self.mean_loss(step))

    def late(self, metric: str) -> float | None:
        """Of the runs that have it, the mean of `RunFigures.late`."""
        return _mean(run.late(metric) for run in self.runs)

    @property
    def tokens_per_s(self) -> float | None:
        return _mean(run.tokens_per_s for run in self.runs)

    @property
    def first(self) -> RunFigures:
        return self.runs[0]

    @property
    def counted(self) -> RunFigures:
        """The first whose routes were counted on held-out text, else the first."""
        return next((run for run in self.runs if any(e.routing for e in run.evaluations)), self.first)


def row(variant: Variant, of: Sizes, beside: Sizes, step: int | None) -> dict[str, Any]:
    """What tables of variants have in common.

    Args:
        variant: it may have no runs yet.
        of: sizes of its model.
        beside: those of the model that ratios are to.
        step: at which losses are compared, if there is one yet.
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
    """None where one of them has no loss there."""
    a, b = baseline.losses(step), other.losses(step)
    if not a or not b:
        return None
    common = sorted(a.keys() & b.keys())
    if len(common) > 1 or len(common) == min(len(a), len(b)):
        return Losses([a[seed] for seed in common], [b[seed] for seed in common], paired=True)
    return Losses(list(a.values()), list(b.values()), paired=False)


def variants(runs: Sequence[RunFigures]) -> list[Variant]:
    """In the order in which they first come. Of a variant that has finished runs, the others do not count, nor do
    those of a seed but the newest. Runs of different names that are spread in different ways, say by another strategy,
    are what is compared: so they are variants, too."""
    found: dict[str, list[RunFigures]] = {}
    for run in runs:
        found.setdefault(f"{_what_is_trained(run.spec)} {run.held_out}", []).append(run)
    apart = [same for trained in found.values() for same in _where_trained(trained)]
    names = _short([unseeded(same[0].spec.name) for same in apart])
    counted = [[run for run in same if run.is_finished] or same for same in apart]
    return [_of_one_run_a_seed(name, same) for name, same in zip(names, counted, strict=True)]


def matched_step(compared: Sequence[Variant]) -> int | None:
    """The last step that every run of them has validated, but for runs that have validated none; None without one."""
    validated = [set(run.validations) for variant in compared for run in variant.runs if run.validations]
    return max(set.intersection(*validated), default=None) if validated else None


def _of_one_run_a_seed(name: str, same: Sequence[RunFigures]) -> Variant:
    """With the one that began last of each, in the order of the first: two of a seed are no sample of two."""
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
    """Runs of the same training, apart by name where these stand for different ways to spread it."""
    found: dict[str, list[RunFigures]] = {}
    for run in same:
        found.setdefault(unseeded(run.spec.name), []).append(run)
    ways = [{(c.strategy, c.ep, c.dispatch) for c in (run.spec.cluster for run in named)} for named in found.values()]
    return found.values() if any(way != ways[0] for way in ways) else [list(same)]


def _short(names: Sequence[str]) -> list[str]:
    """Without the words that all begin with, each once."""
    words = [name.split("-") for name in names]
    common = len(list(takewhile(lambda same: len(set(same)) == 1, zip(*words, strict=False)))) if len(names) > 1 else 0
    cut = ["-".join(parts[common:]) or name for parts, name in zip(words, names, strict=True)]
    return [name if cut.count(name) == 1 else f"{name} ({cut[:i].count(name) + 1})" for i, name in enumerate(cut)]


CONFIDENCE = 0.95


class Verdict(NamedTuple):
    """On the difference of validation losses, the other's less the baseline's, in nats per token."""

    baseline: str
    other: str
    step: int
    difference: float
    low: float | None
    """Of the interval that holds the true difference with CONFIDENCE, by Student's t; None with one seed."""
    high: float | None
    seeds: int
    """Of the variant with fewer."""
    paired: bool
    """Differences were taken seed by seed, over the seeds that both have."""

    @property
    def is_clear(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    @property
    def said(self) -> str:
        """In a sentence."""
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
    """Args:
    baseline, other: to compare.
    step: that both were validated at.

    Returns:
        None where one of them has no loss there.

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
    """Of the mean difference: Student's where they are pairs, else Welch's."""
    try:
        from scipy import stats
    except ImportError as e:
        raise DataError("intervals", "scipy is missing", "pip install 'mhmoe-ray[report]'") from e
    a, b = losses.baseline, losses.other
    test = stats.ttest_rel(b, a) if losses.paired else stats.ttest_ind(b, a, equal_var=False)
    interval = test.confidence_interval(CONFIDENCE)
    return float(interval.low), float(interval.high)


def table(place: SweepDir) -> list[dict[str, Any]]:
    """JSON: one for each variant, in the order of the sweep. Losses are those of finished runs, while none is of
    all, at the last step that they have all validated; runs whose last one is not finite have none. Ratios are to the
    first variant."""
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
