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
    step: int
    """Training step of the evaluated checkpoints."""
    rows: list[QualityRow]
    """Rows sorted by what they measure, and then by variant."""

    def as_json(self) -> dict[str, Any]:
        """Return the table as an object for `mhmoe report --json`."""
        return {**self._asdict(), "rows": [row._asdict() for row in self.rows]}


def quality_tables(variants: Sequence[Variant], baseline: Variant) -> list[QualityTable]:
    """Return a table for each evaluation of encoders or vision models that all runs of all variants have.

    An evaluation that some runs lack is left out, because the other runs would be a selection of the seeds. A missing
    scipy is a DataError.
    """
    by_run = [_evaluations_by_question(run) for variant in variants for run in variant.runs]
    first_run = by_run[0] if by_run else {}
    common_questions = [question for question in first_run if all(question in evaluations for evaluations in by_run)]
    return [_table(first_run[question], question, variants, baseline) for question in common_questions]


def runs_without_quality(variants: Sequence[Variant]) -> list[RunFigures]:
    """Return the runs that lack the evaluation that most runs have, and so keep it out of the tables."""
    by_run = [(run, set(_evaluations_by_question(run))) for variant in variants for run in variant.runs]
    run_counts = Counter(question for _, questions in by_run for question in questions)
    most_common = next((question for question, _ in run_counts.most_common(1)), None)
    return [run for run, questions in by_run if most_common is not None and most_common not in questions]


class _Question(NamedTuple):
    """Question that evaluations of different runs answer: the same request for a checkpoint of the same step.

    Checkpoint names may differ: they contain the number of the worker group, which grows with each restart of a run.
    """

    step: int
    digest: str


def _evaluations_by_question(run: RunFigures) -> dict[_Question, Evaluation]:
    return {_Question(e.step, e.request.question_digest): e for e in run.all_evaluations if e.quality}


def _table(example: Evaluation, question: _Question, variants: Sequence[Variant], baseline: Variant) -> QualityTable:
    """Return the table of the answers to a question; `example` is the evaluation of any one of the runs."""
    rows = []
    for figure in example.quality:
        values_by_variant = {variant.name: _values_by_seed(variant, question, figure) for variant in variants}
        for name, values in values_by_variant.items():
            if not values:
                continue
            pairs = None if name == baseline.name else pair_values(values_by_variant[baseline.name], values)
            test = pairs.test() if pairs else None
            rows.append(
                QualityRow(
                    figure,
                    name,
                    statistics.fmean(values.values()),
                    statistics.stdev(values.values()) if len(values) > 1 else None,
                    pairs.difference if pairs else None,
                    test.low if test else None,
                    test.high if test else None,
                )
            )
    return QualityTable(example.request.description, example.step, rows)


def _values_by_seed(variant: Variant, question: _Question, figure: str) -> dict[int, float]:
    """Return a variant's values of `figure` by seed, without runs whose model has no such output, such as masks."""
    qualities = {run.spec.seed: _evaluations_by_question(run)[question].quality for run in variant.runs}
    return {seed: quality[figure] for seed, quality in qualities.items() if figure in quality}
