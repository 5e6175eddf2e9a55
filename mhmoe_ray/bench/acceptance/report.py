"""Records of an acceptance test, one JSON object per line, and the Markdown page that shows them.

The first record has the device and the size. The others belong to a part: `started` names a case that starts, `case` a
case that ended, with its `rows`, and `status` is written when the part's process ends.
"""

from pathlib import Path
from typing import Any

from mhmoe_ray.bench.acceptance.goals import STATED_PREDICTIONS, Prediction
from mhmoe_ray.bench.acceptance.settings import Row
from mhmoe_ray.runs import jsonl

RECORDS_FILE, REPORT_FILE = "records.jsonl", "report.md"
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
    lines = ["# Acceptance of the GPU path", ""]
    if incomplete_parts:
        lines += [f"To be continued: {', '.join(incomplete_parts)}.", ""]
    for part, rows in rows_by_part.items():
        lines += [f"## {part}", "", "| | figures | prediction |", "| --- | --- | --- |"]
        for row in rows:
            comparisons = [_comparison(prediction, row) for prediction in predictions.get(f"{part}: {row['name']}", [])]
            lines.append(f"| {row['name']} | {_figures(row)} | {'; '.join(comparisons)} |")
        lines.append("")
    (folder / REPORT_FILE).write_text("\n".join(lines))


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
    figure = row.get(prediction.unit)
    if not prediction.is_limit or figure is None:
        return text
    return f"{text}: {'reached' if figure <= prediction.value else 'not reached'}"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")
