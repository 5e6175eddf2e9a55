"""The output of `mhmoe report`: a self-contained page, and the same figures as PNGs."""

import io
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, select_autoescape

from mhmoe_ray import pictures
from mhmoe_ray.errors import RunError
from mhmoe_ray.report import plots
from mhmoe_ray.report.figures import Routes, RunFigures, compared_use, routes
from mhmoe_ray.report.variants import Variant, Verdict, matched_step, row, variants, verdict
from mhmoe_ray.runs import events, metrics
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.runs.metrics import METRICS
from mhmoe_ray.spec import RunSpec, leaves

if TYPE_CHECKING:
    from matplotlib.figure import Figure


PAGE = "report.html"
MOST_LOAD = 2.0


def write_report(runs: Sequence[RunDir], folder: Path, baseline: str | None = None) -> list[Verdict]:
    """Write the page and its PNGs.

    Args:
        runs: the runs, which must have been trained, not imported.
        folder: the output folder, created if missing; files of the same names in it are replaced.
        baseline: the name of the variant that the others are compared with; the first variant by default.

    Returns:
        The verdicts on the page.

    Raises:
        RunError: no run has numbers yet, a run was imported, or there is no such baseline.
        DataError: matplotlib or scipy is not installed, or the folder cannot be written.
    """
    read = [one for run in runs if (one := RunFigures.read(run)).lines]
    if not read:
        raise RunError("report", "none of the runs has numbers yet", "wait for their first steps")
    diverged = [one for one in read if one.is_diverged]
    compared = [one for one in read if not one.is_diverged] or read
    ended = any(one.is_finished for one in compared)
    found = variants([one for one in compared if not (ended and one.has_given_up)])
    first = found[0] if baseline is None else next((v for v in found if v.name == baseline), None)
    if first is None:
        why = "there is no such variant among the runs"
        if baseline in [v.name for v in variants(compared)]:
            why = "its runs did not get to the end as others did"
        elif baseline in [v.name for v in variants(read)]:
            why = "the last validation of its runs is not finite"
        raise RunError(f"baseline {baseline}", why, f"choose from {', '.join(v.name for v in found)}")
    step = matched_step(found)
    repeated = [one for variant in found for one in variant.repeated]
    counted_runs = [one for variant in found for one in variant.runs]
    # What was stopped by what it learnt would move a mean, and one that began just now the step.
    unfinished = [one for one in compared if one not in counted_runs and one not in repeated]
    verdicts = [v for other in found if step and other is not first and (v := verdict(first, other, step))]
    counted = {v.name: r for v in found if (r := routes(v.counted)) is not None}
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with pictures.style():
        figures = {name: _written(figure, folder / f"{name}.png") for name, figure in _figures(found, first, counted)}
    page = (
        _environment()
        .get_template("page.html")
        .render(
            title=", ".join(v.name for v in found),
            made=time.strftime("%Y-%m-%d %H:%M"),
            rows=[_row(v, first, step, counted.get(v.name)) for v in found],
            baseline=first.name,
            step=step,
            verdicts=verdicts,
            figures=figures,
            use=_use(first.name, counted),
            differences=_differences(found),
            runs=[_run(run) for run in read],
            left_out=[run.id for run in runs if run.id not in {one.run.id for one in read}],
            diverged=[one.run.id for one in diverged],
            unfinished=[f"{one.run.id} ({events.state(one.happened)})" for one in unfinished],
            repeated=[f"{one.run.id} (seed {one.spec.seed})" for one in repeated],
            all_diverged=diverged == compared,
            unequal=_unequal(found),
            seeds=[f"{v.name} seed {v.first.spec.seed}" for v in found if len(v.runs) > 1],
            of_training=[name for name, r in counted.items() if r.activated is None],
        )
    )
    with _writing(folder):
        (folder / PAGE).write_text(page)
    return verdicts


def _writing(folder: Path) -> AbstractContextManager[None]:
    return pictures.writing(f"report {folder}", "name a folder you can write")


def _environment() -> Environment:
    environment = Environment(loader=PackageLoader("mhmoe_ray.report", "."), autoescape=select_autoescape())
    environment.filters["number"] = lambda value, form=",": "" if value is None else format(value, form)
    return environment


def _figures(found: Sequence[Variant], baseline: Variant, named: dict[str, Routes]) -> "Iterator[tuple[str, Figure]]":
    """Yield the figures of the page, each with the name of its file."""
    if plots.has_curve(found):
        if len(found) > 1:
            yield "loss_beside_baseline", plots.differences(found, baseline)
        for over in plots.AXES:
            yield f"loss_by_{over}", plots.validation(found, over)
    for metric in METRICS.values():
        if metric.plot and (figure := plots.curve(found, metric.name, metric.plot.title, metric.plot.axis)):
            yield metric.name, figure
    if len(found) > 1:
        yield "throughput", plots.throughput(found)
    colours = {v.name: number for number, v in enumerate(found)}
    most = min(MOST_LOAD, max((float(r.load.max()) for r in named.values()), default=1.0))
    if named:
        for relative in (False, True):
            if figure := plots.activation_curve(named, colours, relative):
                yield f"activation{'_relative' if relative else ''}", figure
    for name, counted in named.items():
        yield f"load_{re.sub('[^a-z0-9]+', '_', name)}", plots.heat_map(name, counted, most)


def _use(baseline: str, named: dict[str, Routes]) -> list[str]:
    """Return sentences that compare the experts in use of each variant with those of the baseline."""
    if baseline not in named:
        return []
    said = (compared_use(baseline, name, named[baseline], r) for name, r in named.items() if name != baseline)
    return [sentence for sentence in said if sentence]


def _written(figure: "Figure", png: Path) -> str:
    """Write a figure as PNG, and return it as SVG for the page."""
    pictures.save(figure, png)
    svg = io.StringIO()
    figure.savefig(svg, format="svg", metadata={"Date": None})
    # Without a fixed size, so that it takes that of its place.
    return re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", svg.getvalue()[svg.getvalue().index("<svg") :])


def _row(variant: Variant, baseline: Variant, step: int | None, counted: Routes | None) -> dict[str, Any]:
    moe, several = variant.first.spec.model.moe, len(variant.runs) > 1
    return {
        "name": variant.name,
        "runs": len(variant.runs),
        "shape": f"h {moe.heads}, E {moe.experts}, k {moe.top_k}, f {moe.d_expert}" if moe else "dense",
        **row(variant, variant.first.sizes, baseline.first.sizes, step),
        "bits_per_byte": _bits_per_byte(variant),
        "routes_of": counted.source + (f", seed {variant.counted.spec.seed}" if several else "") if counted else "",
        "distinct": counted.distinct if counted else None,
        "agreement": counted.agreement if counted else None,
    }


def _bits_per_byte(variant: Variant) -> tuple[float, int] | None:
    """Return the mean of the runs' newest evaluations on held-out text, in bits per byte, and their step.

    None unless all runs have such an evaluation of the same step.
    """
    newest = [next((e for e in reversed(run.evaluations) if e.domains), None) for run in variant.runs]
    found = [evaluation for evaluation in newest if evaluation is not None]
    steps = {evaluation.step for evaluation in found}
    if len(found) < len(newest) or len(steps) != 1:
        return None
    bits = [b for evaluation in found if (b := evaluation.total.bits_per_byte) is not None]
    return (statistics.fmean(bits), steps.pop()) if len(bits) == len(found) else None


def _differences(found: Sequence[Variant]) -> dict[str, list[str]]:
    """Return the keys of the model, the data and the training in which the variants differ, with all their values."""
    flat = [dict(_leaves(v.first.spec)) for v in found]
    keys = dict.fromkeys(key for one in flat for key in one)
    return {
        key: [str(one.get(key, "")) for one in flat] for key in keys if len({str(one.get(key, "")) for one in flat}) > 1
    }


def _unequal(found: Sequence[Variant]) -> list[str]:
    """Return, in words, the differences between variants that make losses at the same step hard to compare."""
    specs = [v.first.spec for v in found]
    what: dict[str, set[Any]] = {
        "tokens in a step": {spec.tokens_per_step for spec in specs},
        "held-out text or tokenizer": {(v.first.held_out, v.first.spec.model.vocab_size) for v in found},
        "the number of steps, over which the learning rate comes down": {spec.train.steps for spec in specs},
        "length of a sample": {spec.data.seq_len for spec in specs},
    }
    return [name for name, values in what.items() if len(values) > 1]


def _leaves(spec: RunSpec) -> Iterator[tuple[str, Any]]:
    return leaves(spec.model_dump(mode="json", include={"model", "data", "train"}))


def _run(run: RunFigures) -> dict[str, Any]:
    started = events.newest(run.happened, "started")
    return {
        "id": run.run.id,
        "seed": run.spec.seed,
        "state": events.state(run.happened),
        "steps": run.steps,
        "tokens": run.lines[-1][metrics.TOKENS],
        "flops": run.flops(run.lines[-1][metrics.TOKENS]),
        "workers": events.workers(started) if started else "",
        "minutes": run.seconds / 60,
    }
