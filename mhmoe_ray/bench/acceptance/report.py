"""Records of an acceptance test, one JSON object per line, and the Markdown page and the plot that show them.

The first record has the device and the size. The others belong to a part: `started` names a case that starts, `case` a
case that ended, with its `rows`, and `status` is written when the part's process ends.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mhmoe_ray.bench.acceptance.goals import STATED_PREDICTIONS, Prediction
from mhmoe_ray.bench.acceptance.settings import Row
from mhmoe_ray.plotting import BLUE, GREY, ROW_INCHES, new_figure, save, style
from mhmoe_ray.runs import jsonl

RECORDS_FILE, REPORT_FILE, PLOT_FILE = "records.jsonl", "report.md", "predictions.png"
MISSED_SHARE = 0.3
"""Share by which a result may be off its prediction without an explanation."""
TO_BE_CONTINUED = "to be continued"
"""Status of a part that has not ended."""


def append_record(folder: Path, record: Row) -> None:
    """Append a record, so that it survives a crash of the next measurement."""
    jsonl.append(folder / RECORDS_FILE, record)


def read_records(folder: Path) -> list[Row]:
    """Return all records in the folder of a report, without lines that a killed process left unfinished."""
    return list(jsonl.read(folder / RECORDS_FILE))


def part_records(folder: Path, part: str) -> list[Row]:
    """Return the records of one part."""
    return [record for record in read_records(folder) if record.get("part") == part]


def part_status(records: list[Row]) -> str:
    """Return the status of a part from its records."""
    return next((str(record["status"]) for record in reversed(records) if "status" in record), TO_BE_CONTINUED)


def write_report(folder: Path, has_predictions: bool, incomplete_parts: list[str]) -> None:
    """Write the Markdown page of all results so far; predictions hold for full sizes and not for toy sizes."""
    rows_by_part = _rows_by_part(folder)
    predictions = _predictions(rows_by_part) if has_predictions else {}
    machine_rows = [row for row in rows_by_part.get("ceilings", []) if row["name"] in ("machine", "card")]
    lines = ["# Acceptance of the GPU path", "", *(f"{_figures(row)}\n" for row in machine_rows)]
    if incomplete_parts:
        lines += [f"To be continued: {', '.join(incomplete_parts)}.", ""]
    tables, ratios = list[str](), dict[str, float]()
    for part, rows in rows_by_part.items():
        tables += [f"## {part}", "", "| | figures | prediction |", "| --- | --- | --- |"]
        for row in rows:
            name = f"{part}: {row['name']}"
            comparisons = []
            for prediction in predictions.get(name, []):
                comparisons.append(_comparison(prediction, row))
                if prediction.is_estimate_of(row):
                    ratios[name] = row[prediction.unit] / prediction.value
            tables.append(f"| {row['name']} | {_figures(row)} | {'; '.join(comparisons)} |")
        tables.append("")
    if ratios:
        missed_ratios = {name: ratio for name, ratio in ratios.items() if abs(ratio - 1) > MISSED_SHARE}
        lines += ["Results more than 30 % off their predictions, each to be explained here:", ""]
        lines += [f"- {name}: {ratio:.2f} of its prediction" for name, ratio in missed_ratios.items()] or ["- none"]
        if find_spec("matplotlib"):
            _plot(ratios, folder / PLOT_FILE)
            lines += ["", f"![results over predictions]({PLOT_FILE})"]
        lines.append("")
    (folder / REPORT_FILE).write_text("\n".join([*lines, *tables]))


def _plot(ratios: dict[str, float], path: Path) -> None:
    """Draw the ratio of each result to its prediction as a point, and write the plot as a PNG file."""
    with style():
        figure = new_figure(9, 1 + ROW_INCHES * len(ratios))
        axes = figure.subplots()
        axes.axvspan(1 - MISSED_SHARE, 1 + MISSED_SHARE, color=GREY, alpha=0.2)
        axes.plot(list(ratios.values()), list(ratios), "o", color=BLUE)
        axes.set_xscale("log")
        axes.set_xlabel("result over prediction; in the band, a result is at most 30 % off")
        axes.invert_yaxis()
        save(figure, path)


def failures(folder: Path) -> list[str]:
    """Return a line for each failed check, and for each part that did not end normally."""
    return [
        f"{part}: {row['name']}: {_figures(row)}"
        for part, rows in _rows_by_part(folder).items()
        for row in rows
        if row.get("passed") is False or row.get("status", "done") not in ("done", TO_BE_CONTINUED)
    ]


def _rows_by_part(folder: Path) -> dict[str, list[Row]]:
    """Return the results of each part that has begun; the last row of a part is its end."""
    records_by_part: dict[str, list[Row]] = {}
    for record in read_records(folder)[1:]:
        records_by_part.setdefault(record["part"], []).append(record)
    rows_by_part = {}
    for part, records in records_by_part.items():
        ends = [record for record in records if "status" in record]
        last_end = {"status": part_status(records)} | (ends[-1] if ends else {})
        seconds = round(sum(end.get("seconds", 0) for end in ends), 1)
        end_row = {"name": "end of the part", **last_end, "seconds": seconds, "calls": len(ends)}
        rows_by_part[part] = [*(row for record in records for row in record.get("rows", [])), end_row]
    return rows_by_part


def _predictions(rows_by_part: dict[str, list[Row]]) -> dict[str, list[Prediction]]:
    predictions = {name: [prediction] for name, prediction in STATED_PREDICTIONS.items()}
    for row in rows_by_part.get("predictions", []):
        for unit, value in row.items():
            if isinstance(value, int | float):
                predictions.setdefault(row["name"], []).append(Prediction(value, unit, False))
    return predictions


def _figures(row: Row) -> str:
    return ", ".join(f"{key} {_number(value)}" for key, value in row.items() if key not in ("part", "name"))


def _comparison(prediction: Prediction, row: Row) -> str:
    text = f"{'at most ' if prediction.is_limit else ''}{_number(prediction.value)} {prediction.unit}"
    if prediction.is_estimate_of(row):
        return f"{text}: {row[prediction.unit] / prediction.value:.2f} of it"
    if not prediction.is_limit or prediction.unit not in row:
        return text
    return f"{text}: {'reached' if row[prediction.unit] <= prediction.value else 'not reached'}"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")
