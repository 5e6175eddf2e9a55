"""Tests of reading single lines of long JSONL files, against all of their lines."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_ray.runs import jsonl
from mhmoe_ray.runs.jsonl import JsonlSnapshot
from mhmoe_ray.storage import ObjectPath


@pytest.fixture(autouse=True, scope="module")
def small_reads():
    """Reduce the sizes of the blocks that are read, so that lines cross the edges of blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonl, "BLOCK_BYTES", 64)
        patch.setattr(jsonl, "PROBE_BYTES", 16)
        yield


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("glimpse") / "lines.jsonl"


LENGTHS = st.lists(st.integers(0, 200), max_size=40)


def write(path, lengths, torn=""):
    """Write a line for each of `lengths`, with so many characters of padding, then the incomplete line `torn`.

    Return the complete lines.
    """
    lines = [{"i": i, "pad": "x" * length} for i, length in enumerate(lengths)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)
    return lines


@given(lengths=LENGTHS, torn=st.sampled_from(["", '{"i": 7', "{"]))
def test_lines_backwards_yields_every_complete_line(path, lengths, torn):
    lines = write(path, lengths, torn)
    assert list(JsonlSnapshot(path).lines_backwards()) == lines[::-1]


@given(lengths=LENGTHS, share=st.floats(0, 1))
def test_line_at_returns_first_line_from_offset(path, lengths, share):
    lines = write(path, lengths)
    offset = int(path.stat().st_size * share)
    line_start, expected = 0, None
    for line in lines:
        if line_start >= offset:
            expected = line
            break
        line_start += len(json.dumps(line)) + 1
    assert JsonlSnapshot(path).line_at(offset) == expected


@given(lengths=LENGTHS, first_index=st.integers(0, 45))
def test_first_match_returns_first_matching_line(path, lengths, first_index):
    lines = write(path, lengths)
    result = JsonlSnapshot(path).first_match(lambda line: line["i"] >= first_index)
    assert result == (lines[first_index] if first_index < len(lines) else None)


def test_sample_lines_are_evenly_spaced(path):
    write(path, [5] * 1000)
    indices = [line["i"] for line in JsonlSnapshot(path).sample_lines(10)]
    assert indices == sorted(indices)
    assert indices == pytest.approx([100 * i for i in range(10)], abs=6)


def test_missing_file_is_empty(tmp_path):
    snapshot = JsonlSnapshot(tmp_path / "none")
    assert (snapshot.size, list(snapshot.lines_backwards()), snapshot.line_at(0), snapshot.sample_lines(3)) == (
        0,
        [],
        None,
        [],
    )
    assert snapshot.first_match(lambda line: True) is None


def test_segments_of_an_object_store_are_one_file(tmp_path, s3, monkeypatch):
    monkeypatch.setattr(jsonl, "SEGMENT_BYTES", 40)
    query, _ = s3
    path = ObjectPath(f"s3://bucket/{tmp_path.name}/lines.jsonl?{query}")
    for i in range(12):
        jsonl.append(path, {"i": i}, immediate=i < 3)
        jsonl.flush(path)
    snapshot = JsonlSnapshot(path)
    assert [line["i"] for line in snapshot.lines_backwards()] == list(range(12))[::-1]
    assert [line["i"] for line in snapshot.sample_lines(4)] == pytest.approx([0, 3, 6, 9], abs=1)
    assert snapshot.first_match(lambda line: line["i"] >= 7) == {"i": 7}
