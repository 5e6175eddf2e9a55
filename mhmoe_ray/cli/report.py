"""`mhmoe report`: compare runs on one page."""

from pathlib import Path
from typing import Annotated

import typer

from mhmoe_ray.cli import common
from mhmoe_ray.cli.common import STORAGE, JsonOption, StorageOption, out, print_json


def report(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            help="Ids, beginnings of ids, or paths; of a sweep its name. The newest run by default.",
            autocompletion=common.runs,
            show_default=False,
        ),
    ] = None,
    to: Annotated[Path, typer.Option(help="Folder for the page and its pictures.")] = Path("report"),
    baseline: Annotated[
        str | None, typer.Option(help="What the others are compared with; the first by default.")
    ] = None,
    storage: StorageOption = STORAGE,
    json: JsonOption = False,
) -> None:
    """Write one self-contained HTML page, and PNGs, that compare runs: losses against steps, tokens and FLOPs, sizes
    and compute, balance, loads of experts, throughput, and a verdict with its uncertainty over seeds (extra `report`).

    Runs that differ in their seed alone count as one variant. For example `mhmoe report follow-up-small --baseline
    smoe`.
    """
    from mhmoe_ray.report.page import PAGE, write_report
    from mhmoe_ray.runs.directory import find_run
    from mhmoe_ray.runs.sweeps import sweep_dir
    from mhmoe_ray.storage import location

    found = [] if runs else [find_run(None, storage, with_job=True)]
    for name in runs or []:
        sweep = sweep_dir(location(storage).absolute(), name)
        if sweep.exists:  # one of whose runs may have no job yet
            found += [run for run in sweep.runs().values() if run.attempts_file.exists()]
        else:
            found.append(find_run(name, storage, with_job=True))
    verdicts = write_report(list(dict.fromkeys(found)), to, baseline)
    if json:
        print_json({"page": str(to / PAGE), "verdicts": [v._asdict() for v in verdicts]})
        return
    for verdict in verdicts:
        out.print(verdict.said, soft_wrap=True)
    out.print(f"{to / PAGE}", soft_wrap=True)
