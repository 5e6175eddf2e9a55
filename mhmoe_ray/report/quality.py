"""Tables of the accuracies, precisions and recalls of variants, from evaluations that all their runs have."""

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from mhmoe_ray.evaluate.request import Evaluation
from mhmoe_ray.report.figures import RunFigures
from mhmoe_ray.report.seeds import pair_values
from mhmoe_ray.report.variants import Variant


class QualityRow(NamedTuple):
    """Accuracy, precision or recall of one variant, and its difference to that of the baseline."""

    figure: str
    variant: str
    mean: float
    """Mean over the seeds."""
    deviation: float | None
    """Sample standard deviation over the seeds; None with one seed."""
    difference: float | None
    """Mean of the variant's values minus those of the baseline; None for the baseline itself."""
    low: float | None
    """Lower end of the confidence interval of the difference; None for the baseline, and with one seed."""
    high: float | None


class QualityTable(NamedTuple):
    """Accuracies, precisions and recalls of all variants in one evaluation that all their runs have."""

    description: str
    """Description of what was evaluated."""
    step: int
    """Training step of the evaluated checkpoints."""
    rows: list[QualityRow]
    """Rows sorted by what they measure, and then by variant."""

    def as_json(self) -> dict[str, Any]:
        """Return the table as an object for `mhmoe report --json`."""
        return {**self._asdict(), "rows": [row._asdict() for row in self.rows]}


def quality_tables(variants: Sequence[Variant], baseline: Variant) -> list[QualityTable]:
    """Return a table for each evaluation of encoders or vision models that all runs of all variants have.

    An evaluation that some runs lack is left out, because the other runs would be a selection of the seeds.

    Raises:
        DataError: scipy, which intervals need, is not installed.
    """
    by_key = [_evaluations_by_key(run) for variant in variants for run in variant.runs]
    common_keys = [key for key in by_key[0] if all(key in evaluations for evaluations in by_key)] if by_key else []
    return [_table(by_key[0][key], key, variants, baseline) for key in common_keys]


def runs_without_quality(variants: Sequence[Variant]) -> list[RunFigures]:
    """Return the runs that lack the evaluation that most runs have, and so keep it out of the tables.

    The list is empty if all runs have an evaluation in common, or if no run has any evaluation.
    """
    by_run = [(run, set(_evaluations_by_key(run))) for variant in variants for run in variant.runs]
    run_counts = Counter(key for _, keys in by_run for key in keys)
    [(most_common_key, _)] = run_counts.most_common(1) or [("", 0)]
    return [run for run, keys in by_run if run_counts and most_common_key not in keys]


def _evaluations_by_key(run: RunFigures) -> dict[str, Evaluation]:
    """Return the evaluations of a run that have accuracies, precisions or recalls, by the key of their request.

    The keys are equal if different runs were evaluated in the same way.
    """
    return {e.request.key: e for e in run.all_evaluations if e.quality}


def _table(example: Evaluation, key: str, variants: Sequence[Variant], baseline: Variant) -> QualityTable:
    """Return the table for the evaluation with this key; `example` is the evaluation of any one of the runs."""
    rows = []
    for figure in example.quality:
        values_by_variant = {variant.name: _values_by_seed(variant, key, figure) for variant in variants}
        for name, values in values_by_variant.items():
            if not values:
                continue
            pairs = None if name == baseline.name else pair_values(values_by_variant[baseline.name], values)
            low, high = (pairs.interval() if pairs else None) or (None, None)
            rows.append(
                QualityRow(
                    figure,
                    name,
                    statistics.fmean(values.values()),
                    statistics.stdev(values.values()) if len(values) > 1 else None,
                    pairs.difference if pairs else None,
                    low,
                    high,
                )
            )
    return QualityTable(example.request.description, example.step, rows)


def _values_by_seed(variant: Variant, key: str, figure: str) -> dict[int, float]:
    """Return an accuracy, precision or recall of a variant's runs, by seed.

    Runs whose model has no such output, for example no masks, are left out.
    """
    qualities = {run.spec.seed: _evaluations_by_key(run)[key].quality for run in variant.runs}
    return {seed: quality[figure] for seed, quality in qualities.items() if figure in quality}
