"""Results of a benchmark, which are printed as a table or as JSON."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from mhmoe_ray.cli import bench_tables
from mhmoe_ray.cli.common import note, number_table, out, print_json


class Results(NamedTuple):
    """Table of medians and ratios, and the results of every round."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    data: dict[str, Any]
    """Results of every round as JSON data."""

    def print(self, json: bool) -> None:
        """Print the table; with `json`, print it to stderr, and the data to stdout as JSON."""
        table = number_table(self.columns, self.rows)
        bench_tables.print_parts(note if json else out, [(self.title, table)])
        if json:
            print_json(self.data)
