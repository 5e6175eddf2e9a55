"""Tests that lines of events.jsonl and metrics.jsonl from others are skipped if they lack what the program reads."""

import json
import os

import pytest

from mhmoe_ray.errors import StorageError
from mhmoe_ray.runs import events, history, jsonl
from mhmoe_ray.runs.directory import create_run
from tests.cli.run import mhmoe
from tests.support.events import FIELDS, LINE, append_line, record
from tests.support.runs import mark_submitted
from tests.support.specs import tiny_spec

EVENT = {"time": 1000.0, "event": "lost", **FIELDS["lost"]}
STEP_LINE = {"step": 1, **LINE}
BAD_VALUES = [{}, True, -1, 0.5, 10**20, float("nan"), float("inf")]
"""Values that no integer field may have."""


@pytest.fixture
def run(tmp_path):
    return create_run(tiny_spec(tmp_path))


def lines_without(line):
    """Yield the line without each of its fields, and with a wrong value of each."""
    for name in line:
        yield json.dumps({key: value for key, value in line.items() if key != name})
        yield json.dumps({**line, name: [[]]})


UNREADABLE_LINES = [
    "[]", "null", "7", "{", "[" * 100_000, '{"a":' * 5000, json.dumps({**EVENT, "reason": "\ud800"}),
    *(json.dumps({**EVENT, "ranks": value}) for value in BAD_VALUES),
    *(json.dumps({**STEP_LINE, "step": value}) for value in [*BAD_VALUES, 0]),
    '{"a":' + "9" * 9000 + "}",
]  # fmt: skip


@pytest.mark.parametrize(("line", "parse"), [(EVENT, events.parse), (STEP_LINE, history.parse_line)])
def test_line_that_does_not_fit_is_skipped(tmp_path, line, parse):
    path, text = tmp_path / "x.jsonl", json.dumps(line)
    bad_lines = [*UNREADABLE_LINES, *lines_without(line)]
    path.write_text("\n".join([*bad_lines, text, *bad_lines, text, ""]))
    assert list(jsonl.read(path, parse)) == [line, line]
    assert list(jsonl.Tail(path, parse).new_lines()) == [line, line]
    snapshot = jsonl.JsonlSnapshot(path, parse)
    assert list(snapshot.lines_backwards()) == [line, line]
    assert snapshot.line_at(0) == line


def test_optional_field_of_a_wrong_type_is_no_event():
    worker = {"rank": 0, "pid": 1, "host": "x", "node": "n"}
    event = {"time": 1.0, "event": "started", "group": 1, "step": 0, "workers": [worker]}
    assert events.parse(json.dumps(event).encode()) == event
    for damage in ({"straddling_groups": "1"}, {"asked": []}, {"workers": [{**worker, "host": None}]}):
        with pytest.raises(ValueError, match="valid"):
            events.parse(json.dumps({**event, **damage}).encode())


def test_unknown_events_and_fields_of_newer_versions_are_read():
    for event in ({"time": 1.0, "event": "merged", "by": [1]}, {**EVENT, "weather": {"wind": 3}}):
        assert events.parse(json.dumps(event).encode()) == event


def test_own_event_without_its_fields_is_a_defect(run):
    for fields in ({"reason": "a", "weather": 1}, {}):
        with pytest.raises(AssertionError, match="not the fields of skipped_checkpoint"):
            events.record(run, "skipped_checkpoint", **fields)


def test_event_with_half_of_a_surrogate_pair_is_written_so_that_it_can_be_read(run):
    events.record(run, "failed", reason="no file caf\udce9")
    assert events.read(run)[0]["reason"] == "no file caf?"


def test_file_in_which_no_line_fits_is_one_error(run):
    for path in (run.events_file, run.metrics_file):
        path.write_text('{"a": 1}\n' * 3)
    for read in (events.read, history.read, history.last_line, lambda run: history.read_trend(run, 10)):
        with pytest.raises(StorageError, match="none of its 3 lines has the fields that it needs; restore it"):
            read(run)
    run.events_file.write_text('{"time": 1')
    assert events.read(run) == []


def test_metrics_without_speed_have_no_rate(run):
    for step in (1, 2):
        append_line(run, step, tokens=10 * step, tokens_per_s=0.0)
    assert history.read_trend(run, 10).rate is None


@pytest.mark.timeout(60)
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to(path)])
def test_pipe_folder_or_loop_in_place_of_a_file_is_one_error(run, make):
    for path in (run.events_file, run.metrics_file):
        make(path)
    for read in (events.read, history.read, history.last_line):
        with pytest.raises(StorageError, match="it is no regular file; restore it from a copy, or move it away"):
            read(run)


def test_commands_bear_lines_with_required_fields_alone(tmp_path, run):
    mark_submitted(run)
    for step in (1, 2):
        append_line(run, step, tokens=10 * step, rows_least=5, balance=1.0)
    for kind in ("prepared", "started", "checkpoint", "lost", "failed"):
        record(run, kind)
    output = mhmoe(tmp_path, "status", COLUMNS="200").out
    assert "waiting for data not finite" in output
    assert "failed" in mhmoe(tmp_path, "list").out


def test_run_with_unreadable_events_is_listed(tmp_path, run):
    mark_submitted(run)
    run.events_file.write_text("{}\n{}\n")
    [row] = mhmoe(tmp_path, "list", "--json").json()
    assert row["state"] == "unreadable events or metrics"
    status = mhmoe(tmp_path, "status")
    assert status.code == 7
    assert "none of its 2 lines has the fields that it needs" in status.err
