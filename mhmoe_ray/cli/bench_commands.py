"""`mhmoe bench commands`: how long the command line lets one wait."""

import tempfile
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from mhmoe_ray.cli.common import JsonOption, SetOption, SpecArg, number_table, out, print_json, read_spec


def commands(
    spec: SpecArg,
    set_: SetOption = [],  # noqa: B006 - typer needs the list
    lines: Annotated[int, typer.Option(min=1, help="Of the long run's metrics.")] = 1_000_000,
    rounds: Annotated[int, typer.Option(min=1, help="Of each.")] = 5,
    submit: Annotated[bool, typer.Option(help="Also submit the spec so often, on the cluster that runs.")] = True,
    json: JsonOption = False,
) -> None:
    """Time `mhmoe --help`, `mhmoe status` of a run with a million lines of metrics, and the way from `mhmoe submit` to
    its job's first sign, each as a process of its own. Submitted runs are ended at once and stay; start a cluster and
    prepare the data beforehand.
    """
    from mhmoe_ray.bench.commands import measure
    from mhmoe_ray.data.shards.manifest import prepared_for
    from mhmoe_ray.spec import dump_spec

    resolved = read_spec(spec, set_)
    with tempfile.TemporaryDirectory(prefix="mhmoe-bench-") as folder:
        file = None
        if submit:
            prepared_for(resolved)
            file = Path(folder) / "spec.yaml"
            file.write_text(dump_spec(resolved))
        figures = measure(resolved, file, Path(folder) / "runs", lines, rounds)
    if json:
        print_json({"lines": lines, **figures._asdict()})
        return
    ways = {
        "mhmoe --help": figures.help,
        f"mhmoe status, {lines:,} lines": figures.status,
        "mhmoe submit, to the job's first sign": figures.submit,
    }
    rows = [[name, f"{median(s):.2f} s", f"{max(s):.2f} s"] for name, s in ways.items() if s]
    out.print(number_table(["", "median", "longest"], rows))
