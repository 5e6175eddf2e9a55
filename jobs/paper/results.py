"""Write the tables of RESULTS.md that have verdicts, from the losses by seed in the folder `losses`.

    mhmoe sweep jobs/rivals.yaml --show --json | python jobs/paper/results.py add rivals
    python jobs/paper/results.py

The first command adds the finished runs of a sweep, whose seeds may come from several machines. The second one writes
each table between the lines `<!-- verdicts SWEEP BASELINE VARIANTS -->` and `<!-- end -->`.
"""

import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from mhmoe_ray.report.seeds import pair_values
from mhmoe_ray.report.verdicts import Verdict, compare_losses

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "RESULTS.md"
STORED_KEYS = ("step", "parameters", "macs_per_token", "losses")
TABLE_PATTERN = re.compile(r"(<!-- verdicts (\S+) (\S+) (\S+) -->\n)(.*?)(<!-- end -->\n)", re.S)
COLUMNS = ("variant", "parameters", "multiply-adds", "loss", "±", "difference", "interval", "p", "verdict")

Rows = dict[str, dict[str, Any]]
"""Stored figures of a sweep's variants, by name; `losses` has the validation loss of each seed."""


def losses_file(sweep: str) -> Path:
    return FOLDER / "losses" / f"{sweep}.json"


def add(path: Path, table: list[dict[str, Any]]) -> None:
    """Add the table of `mhmoe sweep --show --json` to a file of losses; a seed that it has already is replaced."""
    rows: Rows = json.loads(path.read_text()) if path.exists() else {}
    for row in table:
        if row["states"].get("finished"):
            losses = {**rows.get(row["variant"], {}).get("losses", {}), **row["losses"]}
            rows[row["variant"]] = {**{key: row[key] for key in STORED_KEYS}, "losses": losses}
    path.write_text(json.dumps(rows, indent=1) + "\n")


def by_seed(row: dict[str, Any]) -> dict[int, float]:
    return {int(seed): loss for seed, loss in row["losses"].items()}


def verdict_table(rows: Rows, baseline: str, variants: list[str]) -> str:
    """Return a Markdown table of variants beside a baseline, with verdicts at the last step of each."""
    base = rows[baseline]
    pairs = {name: pair for name in variants if (pair := pair_values(by_seed(base), by_seed(rows[name])))}
    verdicts = {verdict.variant: verdict for verdict in compare_losses(baseline, pairs, base["step"])}
    lines = [COLUMNS]
    for name in (baseline, *variants):
        row, losses = rows[name], list(rows[name]["losses"].values())
        deviation = f"{statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        ratios = (f"{row[key] / base[key]:.3f}" for key in ("parameters", "macs_per_token"))
        lines.append((name, *ratios, f"{statistics.fmean(losses):.4f}", deviation, *verdict_cells(verdicts.get(name))))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, tuple("-" * width for width in widths))
    return "".join(f"| {' | '.join(map(str.ljust, line, widths))} |\n" for line in lines)


def verdict_cells(verdict: Verdict | None) -> tuple[str, str, str, str]:
    """Return the cells of a verdict: difference, interval, corrected p-value, and its word or the seeds it needs."""
    if verdict is None:
        return ("", "", "", "")
    if verdict.low is None or verdict.p is None:
        return (f"{verdict.difference:+.4f}", "", "", "one seed")
    needs_seeds = verdict.word == "undecided" and verdict.seeds_for_margin is not None
    seeds_text = f", {verdict.seeds_for_margin} seeds" if needs_seeds else ""
    interval = f"{verdict.low:+.4f} to {verdict.high:+.4f}"
    return (f"{verdict.difference:+.4f}", interval, f"{verdict.p:.2g}", verdict.word + seeds_text)


def render(text: str) -> str:
    """Return the text of RESULTS.md with all tables of verdicts computed from the stored losses."""

    def table(match: re.Match[str]) -> str:
        opening, sweep, baseline, variants, _, closing = match.groups()
        rows = json.loads(losses_file(sweep).read_text())
        return f"{opening}\n{verdict_table(rows, baseline, variants.split(','))}\n{closing}"

    return TABLE_PATTERN.sub(table, text)


if __name__ == "__main__":
    if sys.argv[1:2] == ["add"]:
        add(losses_file(sys.argv[2]), json.load(sys.stdin))
    RESULTS.write_text(render(RESULTS.read_text()))
