"""Tests of the formats of inputs and outputs: rows are read chunk by chunk, and carried to the output unchanged."""

import datetime
import gzip
import json
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_ray.errors import DataError
from mhmoe_ray.serving.batch.formats import FORMATS
from mhmoe_ray.serving.batch.input import check_rows, open_input
from mhmoe_ray.serving.batch.rows import AnswerCounts, RowAnswer

from .conftest import write_input

ANSWER = RowAnswer("größer 🦊", "stop", 3, 2)
ERROR = RowAnswer(prompt_tokens=99, error="too long")
SCORES = [
    {"token": "a", "logprob": -0.25, "bytes": [97], "top_logprobs": [{"token": "b", "logprob": -1, "bytes": [98]}]}
]
PROMPT = {"prompt": "a"}


def tables(path, rows):
    source = open_input(str(path))
    return list(FORMATS[source.format].read_tables(source, rows))


def test_lines_are_carried_to_the_last_digit(tmp_path):
    lines = [
        b'{"prompt": "a", "n": 1.10, "big": 123456789012345678901234567890, "huge": 1e400}',
        b'  {"prompt":"\\u00e9",\t"n": -0.0 }  \r',
        b"",
        b"   ",
        b'{"nested": {"a": [1, {"b": null}]}, "prompt": "c", "n": 1, "n": 2}',
    ]
    (tmp_path / "in.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    [table] = tables(tmp_path / "in.jsonl", 10)
    content = FORMATS["jsonl"].encode(table, [ANSWER] * 3, has_logprobs=False)
    keys = ', "text":"größer 🦊","finish_reason":"stop","prompt_tokens":3,"tokens":2,"error":null}'.encode()
    assert content.split(b"\n") == [
        *(line.strip().removesuffix(b"}").rstrip() + keys for line in (lines[0], lines[1], lines[4])),
        b"",
    ]


def test_deeply_nested_lines_are_decoded(tmp_path):
    """The line is nested more deeply than the standard library can decode, which is about 1,000 levels."""
    line = b'{"prompt": "a", "nested": ' + b"[" * 1020 + b"]" * 1020 + b"}"
    (tmp_path / "in.jsonl").write_bytes(line)
    [table] = tables(tmp_path / "in.jsonl", 10)
    assert [row["prompt"] for row in FORMATS["jsonl"].table_rows(table)] == ["a"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=8,
)


@given(fields=st.dictionaries(st.text().map("x_".__add__), json_values), indent=st.sampled_from([", ", ",", " ,\t"]))
def test_any_line_gets_the_keys_of_its_answer(fields, indent):
    line = json.dumps({"prompt": "a", **fields}, separators=(indent, ": "))
    [output_line, end] = FORMATS["jsonl"].encode(pa.table({"line": [line.encode()]}), [ERROR], False).split(b"\n")
    answer = {"text": None, "finish_reason": None, "prompt_tokens": 99, "tokens": None, "error": "too long"}
    assert (json.loads(output_line), end) == ({"prompt": "a", **fields, **answer}, b"")


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_rows_are_read_in_chunks_of_equal_size(tmp_path, suffix):
    rows = [{"prompt": f"row {i}", "id": i} for i in range(25)]
    path = tmp_path / f"in{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    else:
        compress = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.compress}[suffix]
        path.write_bytes(compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    assert check_rows(open_input(str(path)), False) == (25, None)
    chunks = tables(path, 10)
    assert [len(chunk) for chunk in chunks] == [10, 10, 5]
    source_format = FORMATS[open_input(str(path)).format]
    assert [row["prompt"] for chunk in chunks for row in source_format.table_rows(chunk)] == [r["prompt"] for r in rows]


def test_columns_of_any_type_are_carried(tmp_path):
    table = pa.table(
        {
            "id": pa.array([2**63 + 1, None], pa.uint64()),
            "prompt": pa.array(["a", "b"]).dictionary_encode(),
            "time": pa.array([datetime.datetime(2026, 1, 2, 3, 4, 5, 6)] * 2, pa.timestamp("us", "UTC")),
            "price": pa.array([Decimal("1.10"), None]),
            "nested": [[{"a": [1, 2]}], []],
            "image": pa.array([b"\xff\x00", b""]),
        }
    ).replace_schema_metadata({"owner": "ann"})
    pq.write_table(table, tmp_path / "in.parquet")
    [chunk] = tables(tmp_path / "in.parquet", 10)
    answer = ANSWER._replace(logprobs=SCORES)
    (tmp_path / "out.parquet").write_bytes(FORMATS["parquet"].encode(chunk, [answer, ERROR], has_logprobs=True))
    written_table = pq.read_table(tmp_path / "out.parquet")
    assert written_table.select(table.column_names).equals(table)
    assert written_table.schema.metadata[b"owner"] == b"ann"
    assert [*written_table.column_names[6:]] == [
        "text",
        "finish_reason",
        "prompt_tokens",
        "tokens",
        "error",
        "logprobs",
    ]
    assert written_table.select(written_table.column_names[6:]).to_pylist() == [answer._asdict(), ERROR._asdict()]
    # All files have the same types, also one in which all answers are errors.
    error_content = FORMATS["parquet"].encode(chunk, [ERROR, ERROR], has_logprobs=True)
    assert pq.read_schema(pa.BufferReader(error_content)).equals(written_table.schema)


@pytest.mark.parametrize("name", ["jsonl", "parquet"])
def test_answers_in_a_file_are_counted(tmp_path, name):
    path = write_input(tmp_path / f"in.{name}", [PROMPT] * 3)
    [table] = tables(path, 10)
    content = FORMATS[name].encode(table, [ANSWER, ERROR, ANSWER], has_logprobs=False)
    assert FORMATS[name].count(content) == AnswerCounts(rows=3, errors=1, prompt_tokens=105, tokens=4)


MALFORMED_LINES = {
    "it is not JSON": '{"prompt": "a"',
    "it is not an object": '["a"]',
    "neither a 'prompt' nor 'messages'": '{"text": "a"}',
    "both a 'prompt' and 'messages'": '{"prompt": "a", "messages": []}',
    "its 'prompt' is not a text": '{"prompt": 5}',
    "lone surrogate": '{"prompt": "\\ud800"}',
    "messages: List should have at least 1 item": '{"messages": []}',
    "messages: Input should be a valid list": '{"messages": "a"}',
    "messages.0.role: Field required": '{"messages": [{"content": "a"}]}',
    "messages.1: Value error, content is required": '{"messages": [{"role": "a", "content": "a"}, {"role": "user"}]}',
    "messages.0.tool: Extra inputs": '{"messages": [{"role": "a", "content": "a", "tool": 1}]}',
    "its key 'text' is one of those of an answer": '{"prompt": "a", "text": "b"}',
    "its key 'logprobs' is one of": '{"prompt": "a", "logprobs": "b"}',
}


@pytest.mark.parametrize(("reason", "line"), MALFORMED_LINES.items())
def test_malformed_line_is_one_line(tmp_path, reason, line):
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "a"}\n\n' + line + '\n{"prompt": 6}\n{"prompt": "d"}\n')
    with pytest.raises(DataError) as raised:
        check_rows(open_input(str(path)), has_logprobs=True)
    text = str(raised.value)
    assert text.startswith(f"input {path} line 3: ")
    assert "\n" not in text
    assert reason in text
    assert text.endswith("(2 of 4 rows cannot be answered); correct or remove them; nothing was computed")


def test_key_of_scores_is_allowed_for_answers_without_scores(tmp_path):
    path = write_input(tmp_path / "in.jsonl", [{"prompt": "a", "logprobs": 1}])
    assert check_rows(open_input(str(path)), has_logprobs=False).row_count == 1


def test_first_conversation_is_reported(tmp_path):
    path = write_input(tmp_path / "in.jsonl", [PROMPT, {"messages": [{"role": "user", "content": "a"}]}])
    assert check_rows(open_input(str(path)), False) == (2, 2)


def test_unusable_inputs_are_one_line(tmp_path):
    def message(path):
        with pytest.raises(DataError) as raised:
            check_rows(open_input(str(path)), has_logprobs=False)
        return str(raised.value)

    assert "there is no such file" in message(tmp_path / "nowhere.jsonl")
    write_input(tmp_path / "folder.jsonl.d", [])
    folder = tmp_path / "folder"
    folder.mkdir()
    write_input(folder / "a.jsonl", [PROMPT])
    assert "it is not a single file" in message(folder)
    assert "it is not a single file" in message(folder / "*.jsonl")
    (tmp_path / "in.csv").write_text("prompt\na\n")
    assert "its suffix is not one of JSON lines or Parquet; give it one of .jsonl," in message(tmp_path / "in.csv")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    assert "it has no rows" in message(tmp_path / "empty.jsonl")
    assert "it has no column 'prompt' or 'messages'; it has 'text'" in message(
        write_input(tmp_path / "a.parquet", [{"text": "a"}])
    )
    assert "its column 'error' has the name of a column of answers" in message(
        write_input(tmp_path / "b.parquet", [{"prompt": "a", "error": "b"}])
    )
    null_message = message(write_input(tmp_path / "c.parquet", [PROMPT, {"prompt": None}, {"prompt": None}]))
    assert "c.parquet row 2: it has neither a 'prompt' nor 'messages' (2 of 3 rows" in null_message
    path = write_input(tmp_path / "d.parquet", [{"prompt": f"row {i}"} for i in range(1000)])
    path.write_bytes(path.read_bytes()[:-100])
    assert message(path).startswith(f"input {path}: ")
