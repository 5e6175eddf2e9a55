"""The output of `mhmoe report`: a self-contained HTML page, and its plots as PNG files."""

import io
import re
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, select_autoescape

from mhmoe_ray import plotting
from mhmoe_ray.report import plots
from mhmoe_ray.report.comparison import Comparison, compare_runs
from mhmoe_ray.report.figures import RouteSummary, RunFigures, compare_expert_use
from mhmoe_ray.report.quality import runs_without_quality
from mhmoe_ray.report.seeds import MARGIN
from mhmoe_ray.report.variants import Variant, loss_unit, variant_row
from mhmoe_ray.runs import events, metrics
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.runs.metrics import METRICS
from mhmoe_ray.spec import dotted_items

if TYPE_CHECKING:
    from matplotlib.figure import Figure


PAGE_FILE = "report.html"
MAX_LOAD = 2.0
"""Upper end of the colour scale of loads: a single overloaded expert must not hide the differences of the others."""


def write_report(
    runs: Sequence[RunDir], folder: Path, baseline: str | None = None, margin: float = MARGIN
) -> Comparison:
    """Write an HTML page that compares runs, and its plots as PNG files, and return the comparison.

    A missing folder is created, and files of the same names are replaced. Errors are those of `compare_runs`; a missing
    matplotlib and a folder that cannot be written are DataErrors, too.
    """
    comparison = compare_runs(runs, baseline, margin)
    with _translated_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with plotting.style():
        svg_by_name = {name: _write_figure(figure, folder / f"{name}.png") for name, figure in _figures(comparison)}
    with _translated_write_errors(folder):
        (folder / PAGE_FILE).write_text(render_page(comparison, svg_by_name))
    return comparison


def render_page(comparison: Comparison, svg_by_name: Mapping[str, str]) -> str:
    """Return the HTML page of a report, with its plots as SVG."""
    variants, step, routes_by_name = comparison.variants, comparison.step, comparison.routes_by_name
    template = _environment().get_template("page.html")
    return template.render(
        title=", ".join(v.name for v in variants),
        loss_unit=loss_unit(variants),
        creation_time=time.strftime("%Y-%m-%d %H:%M"),
        rows=[_variant_row(v, comparison.baseline, step, routes_by_name.get(v.name)) for v in variants],
        part_names=[*dict.fromkeys(name for v in variants for name in (v.part_losses(step) if step else {}))],
        baseline=comparison.baseline.name,
        step=step,
        verdicts=comparison.verdicts,
        incomparable=comparison.incomparable_text if comparison.incomparable else None,
        quality=comparison.quality,
        unevaluated=[run.run.id for run in runs_without_quality(variants)],
        figures=svg_by_name,
        expert_use=_expert_use_sentences(comparison.baseline.name, routes_by_name),
        different_keys=_different_keys(variants),
        runs=[_run_row(r) for r in comparison.trained],
        untrained=[run.id for run in comparison.untrained],
        diverged=[r.run.id for r in comparison.diverged],
        unfinished=[f"{r.run.id} ({events.state(r.run_events)})" for r in comparison.unfinished],
        repeated=[f"{r.run.id} (seed {r.spec.seed})" for r in comparison.repeated],
        all_diverged=comparison.all_diverged,
        unequal_conditions=_unequal_conditions(variants),
        seeds=[f"{v.name} seed {v.first_run.spec.seed}" for v in variants if len(v.runs) > 1],
        training_routes=[name for name, r in routes_by_name.items() if r.activated is None],
    )


def _translated_write_errors(folder: Path) -> AbstractContextManager[None]:
    return plotting.writing(f"report {folder}", "name a folder you can write")


def _environment() -> Environment:
    """Return the Jinja environment of the page, with the filter `number`, which formats a number and hides None."""
    environment = Environment(loader=PackageLoader("mhmoe_ray.report", "."), autoescape=select_autoescape())
    environment.filters["number"] = lambda value, form=",": "" if value is None else format(value, form)
    return environment


def _figures(comparison: Comparison) -> "Iterator[tuple[str, Figure]]":
    """Yield the plots of the page, each with the name of its PNG file without the suffix."""
    all_variants, routes_by_name = comparison.variants, comparison.routes_by_name
    if plots.has_curve(all_variants):
        comparable_variants = [v for v in all_variants if v.is_comparable(comparison.baseline)]
        if len(comparable_variants) > 1:
            yield "loss_beside_baseline", plots.draw_differences(comparable_variants, comparison.baseline)
        # The axes order variants differently, but the curve of a single one has the same shape against each of them.
        for axis_name in plots.AXES if len(all_variants) > 1 else ("steps",):
            yield f"loss_by_{axis_name}", plots.draw_validation(all_variants, axis_name)
    for metric in METRICS.values():
        if metric.plot is None:
            continue
        label = loss_unit(all_variants) if metric.name == metrics.LOSS else metric.plot.axis
        if figure := plots.draw_curve(all_variants, metric.name, metric.plot.title, label):
            yield metric.name, figure
    if len(all_variants) > 1:
        yield "throughput", plots.draw_throughput(all_variants)
    colours = {v.name: number for number, v in enumerate(all_variants)}
    max_load = min(MAX_LOAD, max((float(r.load.max()) for r in routes_by_name.values()), default=1.0))
    if routes_by_name:
        for relative in (False, True):
            if figure := plots.draw_activation(routes_by_name, colours, relative):
                yield f"activation{'_relative' if relative else ''}", figure
    for name, routes in routes_by_name.items():
        yield f"load_{re.sub('[^a-z0-9]+', '_', name)}", plots.draw_heat_map(name, routes, max_load)


def _expert_use_sentences(baseline: str, routes_by_name: dict[str, RouteSummary]) -> list[str]:
    if baseline not in routes_by_name:
        return []
    sentences = (
        compare_expert_use(baseline, name, routes_by_name[baseline], routes)
        for name, routes in routes_by_name.items()
        if name != baseline
    )
    return [sentence for sentence in sentences if sentence]


def _write_figure(figure: "Figure", png: Path) -> str:
    """Write a plot as a PNG file, and return it as SVG text for the page."""
    plotting.save(figure, png)
    svg = io.StringIO()
    figure.savefig(svg, format="svg", metadata={"Date": None})
    # The figure's fixed size is removed, so that the figure takes the width of the page's column.
    return re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", svg.getvalue()[svg.getvalue().index("<svg") :])


def _variant_row(variant: Variant, baseline: Variant, step: int | None, routes: RouteSummary | None) -> dict[str, Any]:
    """Return the row of a variant in the page's tables of results and of sizes; ratios are relative to the baseline."""
    moe, has_several_runs = variant.first_run.spec.model.moe, len(variant.runs) > 1
    width = f", D {moe.d_sub_token}" if moe and moe.d_sub_token is not None else ""
    return {
        "name": variant.name,
        "runs": len(variant.runs),
        "shape": f"h {moe.heads}{width}, E {moe.experts}, k {moe.top_k}, f {moe.d_expert}" if moe else "dense",
        **variant_row(variant, variant.first_run.sizes, baseline.first_run.sizes, step),
        "bits_per_byte": _bits_per_byte(variant),
        "routes_of": routes.source + (f", seed {variant.routes_run.spec.seed}" if has_several_runs else "")
        if routes
        else "",
        "distinct": routes.distinct if routes else None,
        "agreement": routes.agreement if routes else None,
    }


def _bits_per_byte(variant: Variant) -> tuple[float, int] | None:
    """Return mean bits per byte of the newest held-out evaluations, and their step; None unless all runs share it."""
    newest = [next((e for e in reversed(run.evaluations) if e.domains), None) for run in variant.runs]
    evaluations = [evaluation for evaluation in newest if evaluation is not None]
    steps = {evaluation.step for evaluation in evaluations}
    if len(evaluations) < len(newest) or len(steps) != 1:
        return None
    bits = [b for evaluation in evaluations if (b := evaluation.total_score.bits_per_byte) is not None]
    return (statistics.fmean(bits), steps.pop()) if len(bits) == len(evaluations) else None


def _different_keys(all_variants: Sequence[Variant]) -> dict[str, list[str]]:
    """Return the keys of model, data and training in which the variants' specs differ, with all values."""
    sections = {"model", "data", "train"}
    flat = [dict(dotted_items(v.first_run.spec.model_dump(mode="json", include=sections))) for v in all_variants]
    keys = dict.fromkeys(key for leaves in flat for key in leaves)
    values_by_key = {key: [str(leaves.get(key, "")) for leaves in flat] for key in keys}
    return {key: values for key, values in values_by_key.items() if len(set(values)) > 1}


def _unequal_conditions(all_variants: Sequence[Variant]) -> list[str]:
    """Return the names of conditions in which variants differ, so that losses of the same step are hard to compare."""
    specs = [v.first_run.spec for v in all_variants]
    values_by_subject: dict[str, set[Any]] = {
        "tokens in a step": {spec.tokens_per_step for spec in specs},
        "held-out text or tokenizer": {v.first_run.held_out for v in all_variants},
        "the number of steps, over which the learning rate decays": {spec.train.steps for spec in specs},
        "length of a sample": {spec.data.seq_len for spec in specs},
    }
    return [name for name, values in values_by_subject.items() if len(values) > 1]


def _run_row(run: RunFigures) -> dict[str, Any]:
    start_event = events.newest_event(run.run_events, "started")
    return {
        "id": run.run.id,
        "seed": run.spec.seed,
        "state": events.state(run.run_events),
        "steps": run.steps,
        "tokens": run.lines[-1][metrics.TOKENS],
        "flops": run.flops(run.lines[-1][metrics.TOKENS]),
        "workers": events.describe_workers(start_event) if start_event else "",
        "minutes": run.seconds / 60,
    }
