"""Results of a benchmark, which are printed as a table or as JSON."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from mhmoe_ray.cli.bench_tables import print_results
from mhmoe_ray.cli.output import number_table


class Results(NamedTuple):
    """Table of medians and ratios, and the results of every round."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    data: dict[str, Any]
    """Results of every round as JSON data."""

    def print(self, json: bool) -> None:
        """Print the table; with `json`, print it to stderr, and the data to stdout as JSON."""
        print_results([(self.title, number_table(self.columns, self.rows))], json, self.data)
