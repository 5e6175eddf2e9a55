"""`mhmoe report`: compare runs on one page."""

from pathlib import Path
from typing import Annotated

import typer

from mhmoe_ray.cli import options
from mhmoe_ray.cli.output import print_json, print_line, show_activity
from mhmoe_ray.report.seeds import MARGIN


def report(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            help="Ids of runs, beginnings of ids, paths, or names of sweeps. The newest run by default.",
            autocompletion=options.complete_runs,
            show_default=False,
        ),
    ] = None,
    target_folder: Annotated[Path, typer.Option("--to", help="Folder for the page and its plots.")] = Path("report"),
    baseline: Annotated[
        str | None, typer.Option(help="Variant that the others are compared with; the first by default.")
    ] = None,
    margin: Annotated[
        float, typer.Option(min=0, help="Difference of losses below which variants count as equal.")
    ] = MARGIN,
    storage: options.StorageOption = options.STORAGE,
    json: options.JsonOption = False,
) -> None:
    """Write one self-contained HTML page, and PNGs, that compare runs (needs the extra `report`).

    The page shows losses against steps, tokens and FLOPs; sizes and compute; balance and loads of experts; throughput;
    a verdict with its uncertainty over seeds; and the accuracies, precisions and recalls of evaluations that all runs
    have. Runs that differ in their seed alone count as one variant. A verdict says better, worse, equal within the
    margin, or undecided with the number of seeds that would decide. For example `mhmoe report follow-up-small
    --baseline smoe`.
    """
    show_activity("reading the runs and drawing their plots")
    from mhmoe_ray.report.page import PAGE_FILE, write_report
    from mhmoe_ray.runs.directory import find_run
    from mhmoe_ray.runs.sweeps import sweep_dir
    from mhmoe_ray.storage import location

    run_dirs = [] if runs else [find_run(None, storage, with_job=True)]
    for name in runs or []:
        sweep = sweep_dir(location(storage).absolute(), name)
        if sweep.exists:
            # A run of the sweep that has no attempt (no submitted job) yet has nothing to compare, so it is left out.
            run_dirs += [run for run in sweep.runs().values() if run.attempts_file.exists()]
        else:
            run_dirs.append(find_run(name, storage, with_job=True))
    # A run may be named twice, itself and by its sweep. The order of runs decides the default baseline.
    comparison = write_report(list(dict.fromkeys(run_dirs)), target_folder, baseline, margin)
    if json:
        verdicts, quality = ([item.as_json() for item in items] for items in (comparison.verdicts, comparison.quality))
        print_json({"page": str(target_folder / PAGE_FILE), "verdicts": verdicts, "quality": quality})
        return
    for verdict in comparison.verdicts:
        print_line(verdict.text)
    if comparison.incomparable:
        print_line(comparison.incomparable_text)
    print_line(f"{target_folder / PAGE_FILE}")
