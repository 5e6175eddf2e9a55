"""The table of `mhmoe plan --search`: settings that fit a cluster, the fastest by estimate first."""

from pathlib import Path

from mhmoe_ray.api.plan import traffic_per_rank
from mhmoe_ray.api.search import fitting_settings, setting_figures
from mhmoe_ray.cli.formats import format_bytes, format_seconds
from mhmoe_ray.cli.output import print_json, print_line, print_table
from mhmoe_ray.cli.plan_tables import LINK_NAMES
from mhmoe_ray.errors import SpecError
from mhmoe_ray.planner.adapt import changed_keys, format_keys
from mhmoe_ray.planner.search import Setting
from mhmoe_ray.spec import RunSpec, dump_spec

COUNT = 10
"""Number of settings that are shown."""


def show_settings(spec: RunSpec, nodes: int, gpus: int, write: Path | None, json: bool) -> None:
    """Print the fastest settings, and write the spec of the first one to a new file `write`."""
    if write and write.exists():
        raise SpecError(f"file {write}", "it exists", "name a new file, or remove it")
    settings = fitting_settings(spec, nodes, gpus, COUNT)
    if write:
        write.write_text(dump_spec(settings[0].spec))
    if json:
        print_json([setting_figures(setting) for setting in settings])
        return
    columns = ["", "step", "computing", "exchanging", "memory", *LINK_NAMES, "longest part", "bound by"]
    print_table(columns, [_row(i, setting) for i, setting in enumerate(settings, 1)], names=columns[-2:])
    print_line(
        "\nwhat a rank sends in a step is listed by links; values that are not the spec's, none measured on GPUs:"
    )
    for i, setting in enumerate(settings, 1):
        print_line(f"{i}: {' '.join(format_keys(changed_keys(spec, setting.keys))) or 'none'}")
    if write:
        print_line(f"the spec of setting 1 is in {write}")


def _row(number: int, setting: Setting) -> list[str]:
    step = setting.estimate
    computing, exchanging = (sum(t.seconds for t in part) for part in (step.compute_times, step.exchange_times))
    byte_rows = [row.values() for row in traffic_per_rank(setting.spec, step.layout).values() if row]
    link_bytes = [int(sum(column)) for column in zip(*byte_rows, strict=True)] or [0] * len(LINK_NAMES)
    return [
        str(number),
        f"{format_seconds(step.overlapped_seconds)} to {format_seconds(step.sequential_seconds)}",
        format_seconds(computing),
        format_seconds(exchanging),
        format_bytes(setting.memory),
        *map(format_bytes, link_bytes),
        step.longest_part.name,
        step.longest_part.bound,
    ]
