"""The comparison of runs that a report shows: variants, the step at which they are compared, and verdicts."""

from collections.abc import Sequence
from dataclasses import dataclass

from mhmoe_ray.errors import RunError
from mhmoe_ray.report.figures import RouteSummary, RunFigures, read_routes
from mhmoe_ray.report.quality import QualityTable, quality_tables
from mhmoe_ray.report.seeds import MARGIN
from mhmoe_ray.report.variants import Variant, group_variants, matched_step
from mhmoe_ray.report.verdicts import Verdict, compare_variants
from mhmoe_ray.runs.directory import RunDir


@dataclass(frozen=True)
class Comparison:
    """Comparison of runs, grouped into variants."""

    trained: list[RunFigures]
    untrained: list[RunDir]
    """Runs without metrics, which are left out."""
    diverged: list[RunFigures]
    """Runs whose last validation loss is not finite. They are left out unless `all_diverged`."""
    all_diverged: bool
    unfinished: list[RunFigures]
    """Runs that are left out because they ended before their last step, while at least one other run has finished."""
    variants: list[Variant]
    """Variants of the runs that are not left out."""
    baseline: Variant
    step: int | None
    """Step at which losses are compared; None if at no step all runs were validated."""
    verdicts: list[Verdict]
    """Comparisons of each comparable variant's validation loss with the baseline's, at `step`."""
    quality: list[QualityTable]
    routes_by_name: dict[str, RouteSummary]
    """Counted routes of each variant that has them."""

    @property
    def incomparable(self) -> list[str]:
        """Names of the variants whose losses cannot be compared with those of the baseline."""
        return [variant.name for variant in self.variants if not variant.is_comparable(self.baseline)]

    @property
    def incomparable_text(self) -> str:
        """Sentence about `incomparable`."""
        names = f"{', '.join(self.incomparable)} and {self.baseline.name}"
        return f"losses of {names} cannot be compared, as their held-out texts or tokenizers differ; compare bits/byte"

    @property
    def repeated(self) -> list[RunFigures]:
        """The runs that are left out because a newer run of their variant has the same seed."""
        return [run for variant in self.variants for run in variant.repeated]


def compare_runs(runs: Sequence[RunDir], baseline: str | None = None, margin: float = MARGIN) -> Comparison:
    """Group runs into variants, and compare each with the baseline, by default the first variant.

    Runs without any metrics, an imported run and an unknown `baseline` are RunErrors; without scipy, it is a DataError.
    """
    trained = [run_figures for run_figures in map(RunFigures.read, runs) if run_figures.lines]
    if not trained:
        raise RunError("report", "none of the runs has numbers yet", "wait for their first steps")
    trained_ids = {run_figures.run.id for run_figures in trained}
    diverged = [run for run in trained if run.is_diverged]
    compared = [run for run in trained if not run.is_diverged] or trained
    # Once a run has finished, runs that ended early do not count, because they would distort the mean of their variant
    # and move the step at which losses are compared.
    has_finished_run = any(run.is_finished for run in compared)
    unfinished = [run for run in compared if has_finished_run and run.has_ended_early]
    variants = group_variants([run for run in compared if run not in unfinished])
    baseline_variant = _find_baseline(variants, baseline, compared, trained)
    step = matched_step(variants)
    other_variants = [v for v in variants if v is not baseline_variant and v.is_comparable(baseline_variant)]
    return Comparison(
        trained=trained,
        untrained=[run for run in runs if run.id not in trained_ids],
        diverged=diverged,
        all_diverged=diverged == trained,
        unfinished=unfinished,
        variants=variants,
        baseline=baseline_variant,
        step=step,
        verdicts=compare_variants(baseline_variant, other_variants, step, margin) if step else [],
        quality=quality_tables(variants, baseline_variant),
        routes_by_name={v.name: routes for v in variants if (routes := read_routes(v.routes_run)) is not None},
    )


def _find_baseline(
    variants: Sequence[Variant], name: str | None, compared: Sequence[RunFigures], trained: Sequence[RunFigures]
) -> Variant:
    """Return the variant called `name`, by default the first one; a RunError tells why a variant is left out."""
    baseline = variants[0] if name is None else next((v for v in variants if v.name == name), None)
    if baseline is not None:
        return baseline
    reason = "there is no such variant among the runs"
    if name in [v.name for v in group_variants(compared)]:
        reason = "its runs ended early, unlike others"
    elif name in [v.name for v in group_variants(trained)]:
        reason = "the last validation of its runs is not finite"
    raise RunError(f"baseline {name}", reason, f"choose from {', '.join(v.name for v in variants)}")
