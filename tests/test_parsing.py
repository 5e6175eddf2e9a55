"""Tests of the parsers of foreign files: every damage is a `ParseError` of one line, in bounded time and memory."""

import os

import pytest

from mhmoe_ray.parsing import ParseError, parse_json, parse_object, parse_yaml
from mhmoe_ray.storage import describe_file, read_file

BAD_YAML = [
    "a: 2026-13-45",
    "a: !!int abc",
    "a: !!float x",
    "a: " + "9" * 6000,
    "[" * 5000,
    "{a: " * 400 + "1" + "}" * 400,
    "&a [*a]",
    "a: &a {b: *a}",
    "? [1]\n: 2",
    "a: !!python/name:os.system",
    "<<: 1",
    "a: *unknown",
    "a: !!binary %%%",
    "a: !!timestamp x",
    "a: =",
    "%YAML 9.9\n---\na: 1",
    "a: \x07",
    # Each anchor repeats the one before it ten times, so the text means 10**9 values.
    "\n".join(["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10))]),
]
BAD_JSON = ["", "[" * 100_000, "9" * 6000, "{", '{"a": 1,}', b"\xff", "nul", '{"a"}', b"\x00"]


@pytest.mark.parametrize("text", BAD_YAML, ids=range(len(BAD_YAML)))
def test_bad_yaml_is_one_line(text):
    with pytest.raises(ParseError) as error:
        parse_yaml(text)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("text", BAD_JSON, ids=range(len(BAD_JSON)))
def test_bad_json_is_one_line(text):
    with pytest.raises(ParseError) as error:
        parse_json(text)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("text", ["[]", "1", "null", '"a"'])
def test_a_value_that_is_no_object_is_refused(text):
    with pytest.raises(ParseError, match="it is no JSON object"):
        parse_object(text)


def test_values_are_those_of_the_parsers():
    assert parse_yaml("a: [1, 2.5, x, {b: null}]\nc: &c [1]\nd: *c") == {
        "a": [1, 2.5, "x", {"b": None}],
        "c": [1],
        "d": [1],
    }
    assert parse_object('{"a": [1, null, "é"]}') == {"a": [1, None, "é"]}


def test_only_regular_files_are_read(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert read_file(tmp_path / "link") == b"content"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="it is not a regular file"):
        read_file(tmp_path / "pipe")
    with pytest.raises(OSError, match="it is no regular file"):
        describe_file(tmp_path / "pipe")
    with pytest.raises(IsADirectoryError):
        read_file(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "missing")
