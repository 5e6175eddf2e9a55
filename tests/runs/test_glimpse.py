"""Reads at single places of long files, against all of their lines."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_ray.runs import jsonl
from mhmoe_ray.runs.jsonl import Glimpse
from mhmoe_ray.storage import ObjectPath


@pytest.fixture(autouse=True, scope="module")
def small_reads():
    """Reduce the block sizes, so that lines lie over the edges of what is read at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonl, "BLOCK", 64)
        patch.setattr(jsonl, "PROBE", 16)
        yield


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("glimpse") / "lines.jsonl"


LENGTHS = st.lists(st.integers(0, 200), max_size=40)


def write(path, lengths, torn=""):
    lines = [{"i": i, "pad": "x" * length} for i, length in enumerate(lengths)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)
    return lines


@given(lengths=LENGTHS, torn=st.sampled_from(["", '{"i": 7', "{"]))
def test_backwards_gives_every_whole_line(path, lengths, torn):
    lines = write(path, lengths, torn)
    assert list(Glimpse(path).backwards()) == lines[::-1]


@given(lengths=LENGTHS, share=st.floats(0, 1))
def test_at_gives_the_first_line_that_begins_there_or_later(path, lengths, share):
    lines = write(path, lengths)
    offset = int(path.stat().st_size * share)
    begin, expected = 0, None
    for line in lines:
        if begin >= offset:
            expected = line
            break
        begin += len(json.dumps(line)) + 1
    assert Glimpse(path).at(offset) == expected


@given(lengths=LENGTHS, first=st.integers(0, 45))
def test_first_finds_where_a_condition_begins_to_hold(path, lengths, first):
    lines = write(path, lengths)
    found = Glimpse(path).first(lambda line: line["i"] >= first)
    assert found == (lines[first] if first < len(lines) else None)


def test_spread_gives_lines_from_all_over_in_order(path):
    write(path, [5] * 1000)
    found = [line["i"] for line in Glimpse(path).spread(10)]
    assert found == sorted(found)
    assert found == pytest.approx([100 * i for i in range(10)], abs=6)


def test_a_file_that_is_not_there_has_nothing(tmp_path):
    empty = Glimpse(tmp_path / "none")
    assert (empty.size, list(empty.backwards()), empty.at(0), empty.spread(3)) == (0, [], None, [])
    assert empty.first(lambda line: True) is None


def test_segments_of_an_object_store_are_one_file(tmp_path, s3, monkeypatch):
    monkeypatch.setattr(jsonl, "SEGMENT_BYTES", 40)
    query, _ = s3
    path = ObjectPath(f"s3://bucket/{tmp_path.name}/lines.jsonl?{query}")
    for i in range(12):
        jsonl.append(path, {"i": i}, at_once=i < 3)
        jsonl.flush(path)
    file = Glimpse(path)
    assert [line["i"] for line in file.backwards()] == list(range(12))[::-1]
    assert [line["i"] for line in file.spread(4)] == pytest.approx([0, 3, 6, 9], abs=1)
    assert file.first(lambda line: line["i"] >= 7) == {"i": 7}
