"""Records of an acceptance test, one JSON object per line, and the Markdown page that shows them."""

import json
from pathlib import Path
from typing import Any

from mhmoe_ray.bench.acceptance.predictions import PREDICTIONS, Prediction
from mhmoe_ray.bench.acceptance.settings import Row

RECORDS_FILE, REPORT_FILE = "records.jsonl", "report.md"


def append_record(folder: Path, part: str, row: Row) -> None:
    """Append a result of a part to the file of records, so that it survives a crash of the next measurement."""
    with (folder / RECORDS_FILE).open("a") as file:
        file.write(json.dumps({"part": part, **row}, default=str) + "\n")


def forget_part(folder: Path, part: str) -> None:
    """Remove the records that an earlier run of a part of the test has left."""
    records = [record for record in read_records(folder) if record["part"] != part]
    (folder / RECORDS_FILE).write_text("".join(json.dumps(record) + "\n" for record in records))


def read_records(folder: Path) -> list[Row]:
    """Return all records in the folder of a report; the list is empty if there is no file of records yet."""
    path = folder / RECORDS_FILE
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_report(folder: Path, has_predictions: bool) -> None:
    """Write the Markdown page that shows all records so far.

    Args:
        folder: folder of the records and of the page.
        has_predictions: whether to show predictions, which hold for full sizes and not for toy sizes.
    """
    rows_by_part: dict[str, list[Row]] = {}
    for record in read_records(folder):
        rows_by_part.setdefault(record["part"], []).append(record)
    lines = ["# Acceptance of the GPU path", ""]
    for part, rows in rows_by_part.items():
        lines += [f"## {part}", "", "| | figures | prediction |", "| --- | --- | --- |"]
        lines += [_line(part, row, has_predictions) for row in rows]
        lines.append("")
    (folder / REPORT_FILE).write_text("\n".join(lines))


def failures(folder: Path) -> list[str]:
    """Return a line of text for each check that failed, and for each part of the test that did not end normally."""
    failed_lines = []
    for record in read_records(folder):
        if record.get("passed") is False or record.get("status") not in (None, "done"):
            failed_lines.append(f"{record['part']}: {record['name']}: {_figures(record)}")
    return failed_lines


def _line(part: str, row: Row, has_predictions: bool) -> str:
    prediction = PREDICTIONS.get(f"{part}: {row['name']}") if has_predictions else None
    return f"| {row['name']} | {_figures(row)} | {_comparison(prediction, row) if prediction else ''} |"


def _figures(row: Row) -> str:
    return ", ".join(f"{key} {_number(value)}" for key, value in row.items() if key not in ("part", "name"))


def _comparison(prediction: Prediction, row: Row) -> str:
    """Return a prediction as text and, if it is a limit, whether the measured value keeps to it."""
    text = f"{'at most ' if prediction.is_limit else ''}{_number(prediction.value)} {prediction.unit}"
    figure = row.get(prediction.unit)
    if not prediction.is_limit or figure is None:
        return text
    return f"{text}: {'reached' if figure <= prediction.value else 'not reached'}"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")
