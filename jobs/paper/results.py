"""Write the tables of RESULTS.md and of the folder `results` that have verdicts, from the stored losses.

    mhmoe sweep jobs/rivals.yaml --show --json | python jobs/paper/results.py add rivals
    python jobs/paper/results.py

The first command adds the finished runs of a sweep, whose seeds may come from several machines. The second one writes
each table between the lines `<!-- verdicts SWEEP BASELINE VARIANTS -->` and `<!-- end -->`, and draws the differences
of all tables of a page as NAME.svg beside it.
"""

import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from mhmoe_ray import plotting
from mhmoe_ray.report.seeds import pair_values
from mhmoe_ray.report.verdicts import Verdict, compare_losses

FOLDER = Path(__file__).parent
PAGES = (FOLDER / "RESULTS.md", *sorted((FOLDER / "results").glob("*.md")))
STORED_KEYS = ("step", "parameters", "macs_per_token", "losses")
TABLE_PATTERN = re.compile(r"(<!-- verdicts (\S+) (\S+) (\S+) -->\n)(.*?)(<!-- end -->\n)", re.S)
COLUMNS = ("variant", "parameters", "multiply-adds", "loss", "±", "difference", "interval", "p", "verdict")

COLOURS = {
    "better": plotting.GREEN,
    "worse": plotting.VERMILION,
    "equal": plotting.BLUE,
    "undecided": plotting.GREY,
}

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


def verdicts_by_variant(rows: Rows, baseline: str, variants: list[str]) -> dict[str, Verdict]:
    """Compare variants with a baseline at the last step of each."""
    pairs = {name: pair for name in variants if (pair := pair_values(by_seed(rows[baseline]), by_seed(rows[name])))}
    return {verdict.variant: verdict for verdict in compare_losses(baseline, pairs, rows[baseline]["step"])}


def verdict_table(rows: Rows, baseline: str, variants: list[str]) -> str:
    """Return a Markdown table of variants beside a baseline, with verdicts at the last step of each."""
    base, verdicts = rows[baseline], verdicts_by_variant(rows, baseline, variants)
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


def tables_of(text: str) -> list[tuple[str, Rows, str, list[str]]]:
    """Return sweep, stored rows, baseline and variants of each table with verdicts on a page."""
    matches = TABLE_PATTERN.finditer(text)
    return [(m[2], json.loads(losses_file(m[2]).read_text()), m[3], m[4].split(",")) for m in matches]


def render(text: str) -> str:
    """Return the text of a page with all its tables of verdicts computed from the stored losses."""
    tables = iter(tables_of(text))
    return TABLE_PATTERN.sub(lambda match: f"{match[1]}\n{verdict_table(*next(tables)[1:])}\n{match[6]}", text)


def draw(text: str, path: Path) -> None:
    """Draw the difference of each verdict on a page with its interval, below one another in a plot for each sweep."""
    verdicts_by_sweep: dict[str, list[Verdict]] = {}
    for sweep, *table in tables_of(text):
        verdicts_by_sweep.setdefault(sweep, []).extend(verdicts_by_variant(*table).values())
    counts = [len(verdicts) for verdicts in verdicts_by_sweep.values()]
    with plotting.style():
        figure = plotting.new_figure(6.4, 0.8 * len(counts) + plotting.ROW_INCHES * sum(counts))
        axes = figure.subplots(len(counts), squeeze=False, height_ratios=counts)[:, 0]
        for axis, (sweep, verdicts) in zip(axes, verdicts_by_sweep.items(), strict=True):
            axis.axvline(0, color=plotting.GREY, linewidth=1)
            for row, verdict in enumerate(verdicts):
                axis.plot(verdict.difference, row, "o", color=COLOURS[verdict.word])
                axis.plot((verdict.low, verdict.high), (row, row), color=COLOURS[verdict.word])
            axis.set_yticks(range(len(verdicts)), [f"{v.variant} to {v.baseline}: {v.word}" for v in verdicts])
            axis.set(xlabel="difference of loss in nats; left is better", ylim=(len(verdicts) - 0.5, -0.5), title=sweep)
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    if sys.argv[1:2] == ["add"]:
        add(losses_file(sys.argv[2]), json.load(sys.stdin))
    for page in PAGES:
        page.write_text(render(page.read_text()))
        if page.parent != FOLDER and TABLE_PATTERN.search(page.read_text()):
            draw(page.read_text(), page.with_suffix(".svg"))
