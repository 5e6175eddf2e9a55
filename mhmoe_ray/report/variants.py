"""Variants of runs, and the table of a sweep."""

import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, TypeVar

from mhmoe_ray.planner.sizes import Sizes, compute_sizes
from mhmoe_ray.report.figures import RunFigures
from mhmoe_ray.report.seeds import SeedValues, pair_values
from mhmoe_ray.runs import events, metrics
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.runs.sweeps import SweepDir
from mhmoe_ray.spec import NON_TRAINING_KEYS, RunSpec
from mhmoe_ray.spec.sweep import seeded_name, unseeded_name
from mhmoe_ray.storage import location

T = TypeVar("T")

_UNTRAINED_KEYS = NON_TRAINING_KEYS | dict.fromkeys(("name", "storage", "seed", "origin", "reference"), True)
"""Sections and keys of a spec that do not change what is trained."""


@dataclass(frozen=True)
class Variant:
    """Runs of the same training that differ only in their seed."""

    name: str
    runs: list[RunFigures]
    repeated: tuple[RunFigures, ...] = ()
    """Older runs with the same seeds as `runs`, which statistics leave out: they are not independent samples."""

    def losses(self, step: int) -> dict[int, float]:
        """Return the runs' validation losses at a training step, by seed."""
        return {r.spec.seed: r.validations[step] for r in self.runs if step in r.validations}

    def mean_loss(self, step: int) -> float | None:
        return _mean(self.losses(step).values())

    def deviation(self, step: int) -> float | None:
        """Return the sample standard deviation of the losses over the seeds; None with fewer than two seeds."""
        losses = list(self.losses(step).values())
        return statistics.stdev(losses) if len(losses) > 1 else None

    def perplexity(self, step: int) -> float | None:
        """Return the perplexity of the mean validation loss at a step; None without a loss or for a summed loss."""
        return None if self.has_summed_loss else metrics.perplexity(self.mean_loss(step))

    @property
    def has_summed_loss(self) -> bool:
        """True for encoders and vision models, whose loss is a sum over objectives with different units, and pairs."""
        return any(run.spec.loss_unit != "nats per token" for run in self.runs)

    def part_losses(self, step: int) -> dict[str, float]:
        """Return each objective's mean validation loss at a step, over the runs that have its part of micro-batches."""
        losses = [run.part_validations.get(step, {}) for run in self.runs]
        names = dict.fromkeys(name for run_losses in losses for name in run_losses)
        means = {name: _mean(run_losses.get(name) for run_losses in losses) for name in names}
        return {name: mean for name, mean in means.items() if mean is not None}

    def recent_mean(self, metric: str) -> float | None:
        """Return the mean of a metric over the last tenth of the steps and over the runs; None if no run has it."""
        return _mean(run.recent_mean(metric) for run in self.runs)

    @property
    def tokens_per_s(self) -> float | None:
        return _mean(run.tokens_per_s for run in self.runs)

    @property
    def first_run(self) -> RunFigures:
        return self.runs[0]

    def is_comparable(self, baseline: "Variant") -> bool:
        """Return whether losses have the same tokens as those of the baseline, so that their difference says something.

        Tokens of different tokenizers, or of different texts, are differently hard to predict.
        """
        return self.first_run.held_out == baseline.first_run.held_out

    @property
    def routes_run(self) -> RunFigures:
        """First run whose routes were counted on held-out text, else the first run."""
        return next((run for run in self.runs if any(e.routing for e in run.evaluations)), self.first_run)


def loss_unit(variants: Iterable[Variant]) -> str:
    """Return the unit of the variants' losses, for axes and tables."""
    return ", ".join(dict.fromkeys(run.spec.loss_unit for variant in variants for run in variant.runs))


def variant_row(variant: Variant, variant_sizes: Sizes, baseline_sizes: Sizes, step: int | None) -> dict[str, Any]:
    """Return the columns that tables of reports and of sweeps share; the variant may have no runs yet."""
    return {
        "parameters": variant_sizes.parameters,
        "parameters_ratio": variant_sizes.parameters / baseline_sizes.parameters,
        "macs_per_token": variant_sizes.macs_per_token,
        "macs_ratio": variant_sizes.macs_per_token / baseline_sizes.macs_per_token,
        "loss": variant.mean_loss(step) if step else None,
        "deviation": variant.deviation(step) if step else None,
        "perplexity": variant.perplexity(step) if step else None,
        "part_losses": variant.part_losses(step) if step else {},
        "balance": variant.recent_mean(metrics.BALANCE),
        "dropped": variant.recent_mean(metrics.DROPPED),
        "tokens_per_s": variant.tokens_per_s,
    }


def losses_at(step: int, baseline: Variant, variant: Variant) -> SeedValues | None:
    """Return the validation losses of two variants at a training step; None if one of them has no loss there."""
    return pair_values(baseline.losses(step), variant.losses(step))


def group_variants(runs: Sequence[RunFigures]) -> list[Variant]:
    """Group runs into variants, in the order in which these first appear.

    If a variant has finished runs, only those count; of several runs with the same seed, only the newest counts. Runs
    of the same training with different names are separate variants if they are distributed over workers in different
    ways, because such runs are made to compare these ways.
    """
    runs_by_training = _group_by(runs, lambda run: f"{_training_key(run.spec)} {run.held_out}")
    groups = [group for same_training in runs_by_training.values() for group in _split_by_distribution(same_training)]
    names = _shorten_names([unseeded_name(group[0].spec.name) for group in groups])
    counted_groups = [[run for run in group if run.is_finished] or group for group in groups]
    return [_variant_of_newest_runs(name, group) for name, group in zip(names, counted_groups, strict=True)]


def matched_step(compared: Sequence[Variant]) -> int | None:
    """Return the last step at which all runs with validations were validated; None if there is no such step."""
    validated = [set(run.validations) for variant in compared for run in variant.runs if run.validations]
    return max(set.intersection(*validated), default=None) if validated else None


def _variant_of_newest_runs(name: str, runs: Sequence[RunFigures]) -> Variant:
    # Only the newest run of each seed counts, because two runs with the same seed are not independent samples.
    run_of_seed: dict[int, RunFigures] = {}
    for run in runs:
        if run.run.creation_time() >= run_of_seed.setdefault(run.spec.seed, run).run.creation_time():
            run_of_seed[run.spec.seed] = run
    newest = list(run_of_seed.values())
    return Variant(name, newest, tuple(run for run in runs if run not in newest))


def _group_by(items: Iterable[T], key: Callable[[T], str]) -> dict[str, list[T]]:
    groups: dict[str, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _mean(values: Iterable[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return statistics.fmean(numbers) if numbers else None


def _training_key(spec: RunSpec) -> str:
    """Return a key that is equal for specs that describe the same training, apart from the seed."""
    if spec.start is not None:
        sources = [_unseeded_source(source, spec.seed) for source in spec.start.sources]
        spec = spec.model_copy(update={"start": spec.start.with_sources(sources)})
    return json.dumps(spec.model_dump(mode="json", exclude=_UNTRAINED_KEYS), sort_keys=True)


def _unseeded_source(source: str, seed: int) -> str:
    """Return VARIANT@STEP, equal for all seeds, for a checkpoint of a sweep's run with this seed, else the source."""
    checkpoint = location(source)
    run_name, step = RunDir.of_checkpoint(checkpoint).name, checkpoint.name.partition(".")[0]
    variant = unseeded_name(run_name)
    return f"{variant}@{step}" if run_name == seeded_name(variant, seed) else source


def _split_by_distribution(runs: Sequence[RunFigures]) -> Iterable[list[RunFigures]]:
    """Split runs of a training by name if their strategies, expert-parallel sizes or dispatches differ by name."""
    runs_by_name = _group_by(runs, lambda run: unseeded_name(run.spec.name))
    ways = [
        {(c.strategy, c.ep, c.dispatch) for c in (run.spec.cluster for run in group)} for group in runs_by_name.values()
    ]
    return runs_by_name.values() if any(way != ways[0] for way in ways) else [list(runs)]


def _shorten_names(names: Sequence[str]) -> list[str]:
    """Return the names without the words that all of them begin with; equal results get a number."""
    words = [name.split("-") for name in names]
    common = (
        len(list(takewhile(lambda column: len(set(column)) == 1, zip(*words, strict=False)))) if len(names) > 1 else 0
    )
    cut = ["-".join(parts[common:]) or name for parts, name in zip(words, names, strict=True)]
    return [name if cut.count(name) == 1 else f"{name} ({cut[:i].count(name) + 1})" for i, name in enumerate(cut)]


def sweep_table(sweep_dir: SweepDir) -> list[dict[str, Any]]:
    """Return the table of a sweep as JSON: one object per variant, in the order of the sweep.

    Losses are those of finished runs, or of all runs while none is finished, at the last step at which all of them were
    validated. If variants have different numbers of steps, because some continue others, each variant has the last such
    step of its own runs. Diverged runs do not count. Ratios are relative to the first variant.
    """
    wanted_names = set(sweep_dir.read_order(sweep_dir.order_names()[-1]).wanted)
    figures = {name: RunFigures.read(run) for name, run in sweep_dir.runs().items() if run.attempts_file.exists()}
    compared = {name for name, run in figures.items() if not run.is_diverged}
    compared = {name for name in compared if figures[name].is_finished} or compared
    rows = []
    shown_entries = [e for e in sweep_dir.entries() if e.name in figures or e.name in wanted_names]
    for variant_name, entries in _group_by(shown_entries, lambda entry: entry.variant).items():
        states = Counter(_state(figures.get(entry.name)) for entry in entries)
        variant = Variant(variant_name, [figures[e.name] for e in entries if e.name in compared])
        # The spec of a started run is the one that was used. The sweep file may have changed since, so the spec from
        # that file counts only if no run of the variant has started.
        actual_spec = next((figures[e.name].spec for e in entries if e.name in figures), entries[0].spec)
        rows.append((actual_spec, states, variant))
    has_equal_steps = len({spec.train.steps for spec, _, _ in rows}) == 1
    common_step = matched_step([variant for _, _, variant in rows if variant.runs])
    first_sizes = compute_sizes(rows[0][0].model)
    table = []
    for spec, states, variant in rows:
        step = common_step if has_equal_steps else matched_step([variant])
        table.append(
            {
                "variant": variant.name,
                "states": dict(states),
                "step": step,
                "losses": variant.losses(step) if step else {},
                **variant_row(variant, compute_sizes(spec.model), first_sizes, step),
            }
        )
    return table


def _state(run: RunFigures | None) -> str:
    if run is None:
        return "queued"
    state = events.state(run.run_events)
    return f"{state}, diverged" if run.is_diverged else state
