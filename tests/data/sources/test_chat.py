"""Tests of reading conversations from JSON lines and Parquet."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mhmoe_ray.data.chat.template import ChatTemplate
from mhmoe_ray.data.sources import Reason, find_files
from mhmoe_ray.data.sources.chat import conversation_of
from mhmoe_ray.errors import DataError
from tests.data.sources.read import bad_lines, data_spec, document_texts, read_source
from tests.data.texts import write_lines

PAIR = {"prompt": "hi", "completion": "hello"}
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
LONG = [{"role": "system", "content": ""}, *MESSAGES, {"role": "user", "content": "and 日本語?"}]


def write_records(path, records):
    write_lines(path, [json.dumps(record, ensure_ascii=False).encode() for record in records])


def read_chat(folder, **keys):
    return read_source(folder, format="chat", **keys)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.jsonl.gz"])
def test_both_shapes_of_json_lines_are_conversations(tmp_path, name):
    records = [
        {"messages": MESSAGES, "id": 3},
        PAIR,
        {"messages": LONG, "language": "en"},
        # Data sets such as UltraChat repeat the first message as the prompt.
        {"messages": MESSAGES, "prompt": "hi", "tools": None},
        {"messages": [{**message, "name": None, "tool_calls": None} for message in MESSAGES]},
    ]
    write_records(tmp_path / name, records)
    items, tally = read_chat(tmp_path)
    assert document_texts(items) == ["hi\nhello", "hi\nhello", "\nhi\nhello\nand 日本語?", "hi\nhello", "hi\nhello"]
    # No tokenizer gives the template an end token here, so an answer ends without one.
    rendered_text = "User:\nhi\nAssistant:\nhello"
    assert [item.conversation.text for item in items if item.line != 3] == [rendered_text] * 4
    assert items[2].conversation.text == f"System:\n\n{rendered_text}User:\nand 日本語?\n"
    assert {item.conversation.text[slice(*item.conversation.spans[0])] for item in items} == {"hello"}
    assert (items[2].language, items[0].language, tally.documents) == ("en", None, 5)


@pytest.mark.parametrize(
    ("record", "detail"),
    [
        ([], "it is a list, not an object"),
        ({"text": "hi"}, "no 'messages', nor 'prompt' and 'completion', among 'text'"),
        ({"prompt": "hi", "response": "x"}, "among 'prompt', 'response'"),
        ({"messages": "hi"}, "'messages' is a string, not a list"),
        ({"messages": None}, "'messages' is null, not a list"),
        ({"messages": []}, "it has no message of the role assistant"),
        ({"messages": MESSAGES[:1]}, "it has no message of the role assistant"),
        ({"messages": ["hi", "hello"]}, "message 1 is a string, not an object"),
        ({"messages": [*MESSAGES, {"role": "user"}]}, "the content of message 3 is missing, not a string"),
        ({"messages": [*MESSAGES, {"content": "x"}]}, "the role of message 3 is missing, not a string"),
        ({"messages": [{"role": "user", "content": None}]}, "the content of message 1 is null, not a string"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]},
            "the content of message 1 is a list, not a string",
        ),
        ({"messages": [{"from": "human", "value": "x"}]}, "the role of message 1 is missing, not a string"),
        ({"messages": [{**MESSAGES[1], "weight": 0}]}, "message 1 has 'weight', not supported"),
        ({"messages": [MESSAGES[0], {"role": "assistant", "content": " \n"}]}, "message 2, of the assistant, is empty"),
        ({"prompt": 3, "completion": "x"}, "the content of message 1 is a number, not a string"),
        ({"prompt": "x", "completion": ""}, "message 2, of the assistant, is empty"),
    ],
)
def test_other_records_are_bad_lines(tmp_path, record, detail):
    write_records(tmp_path / "a.jsonl", [PAIR, record, PAIR])
    items, _ = read_chat(tmp_path)
    assert bad_lines(items) == [(2, Reason.NO_CONVERSATION)]
    assert detail in items[1].message
    assert "\n" not in items[1].message
    assert len(document_texts(items)) == 2


def test_messages_that_the_template_refuses_are_bad_lines(tmp_path):
    tool_message = {"role": "tool", "content": "42"}
    surrogate_pair = b'{"prompt": "\\ud800", "completion": "x"}'
    lines = [json.dumps({"messages": [*MESSAGES, tool_message]}).encode(), surrogate_pair, json.dumps(PAIR).encode()]
    write_lines(tmp_path / "a.jsonl", lines)
    items, _ = read_chat(tmp_path)
    assert bad_lines(items) == [(1, Reason.NO_RENDERING), (2, Reason.SURROGATE)]
    assert items[0].message == ("the chat template does not render it (a role is system, user or assistant, not tool)")


def test_half_a_character_in_a_rendered_name_is_a_bad_line():
    """JavaScript that shortens a name may cut an emoji in two."""
    turn = "{{ m.name }}: {% generation %}{{ m.content }}{% endgeneration %}"
    template = ChatTemplate(f"{{% for m in messages %}}{turn}{{% endfor %}}", "", "")
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    for name, reason in (("Bob", None), ("Bob\ud83d", Reason.SURROGATE)):
        record = {"messages": [{**message, "name": name} for message in messages]}
        result = conversation_of(1, record, "a.jsonl", template)
        assert getattr(result, "reason", None) == reason


@pytest.mark.parametrize(
    "string_type", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str
)
def test_parquet_has_the_same_conversations(tmp_path, string_type):
    message_type = pa.struct([("content", pa.string()), ("role", string_type), ("name", pa.string())])
    conversations = [MESSAGES, LONG, None, [], MESSAGES] * 20
    table = pa.table({"id": range(100), "messages": pa.array(conversations, pa.list_(message_type))})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=33)
    items, tally = read_chat(tmp_path)
    expected_texts = ["hi\nhello", "\nhi\nhello\nand 日本語?", "hi\nhello"] * 20
    assert document_texts(items) == expected_texts
    assert [line for line, _ in bad_lines(items)] == [n for n in range(1, 101) if n % 5 in (3, 4)]
    assert (tally.bytes_read, tally.damaged) == ((tmp_path / "a.parquet").stat().st_size, 0)


def test_parquet_may_have_pairs(tmp_path):
    pq.write_table(pa.table({"prompt": ["hi", None], "completion": ["hello", "x"]}), tmp_path / "a.parquet")
    items, _ = read_chat(tmp_path)
    assert document_texts(items) == ["hi\nhello"]
    assert items[0].conversation.text == "User:\nhi\nAssistant:\nhello"
    assert items[1].message == "it is not a conversation (the content of message 1 is null, not a string)"


def test_parquet_without_conversations_is_lost_as_a_whole(tmp_path):
    pq.write_table(pa.table({"text": ["hi"]}), tmp_path / "a.parquet")
    [item], _ = read_chat(tmp_path)
    assert item.reason is Reason.PART_LOST
    assert "it has no column 'messages', nor 'prompt' and 'completion', among 'text'" in item.message


def test_long_conversations_are_bad_lines(tmp_path):
    long_pair = {"prompt": "x" * 600, "completion": "y" * 600}
    write_records(tmp_path / "a.jsonl", [PAIR, long_pair])
    pq.write_table(pa.Table.from_pylist([PAIR, long_pair]), tmp_path / "b.parquet")
    items, _ = read_chat(tmp_path, max_document_mb=0.001)
    assert bad_lines(items) == [(2, Reason.TOO_LONG)] * 2


def test_conversations_are_never_recognized_but_hinted_at(tmp_path):
    """A record may have a text, too, so only the spec can say what to train on."""
    write_records(tmp_path / "jsonl/a.jsonl", [{"messages": MESSAGES}])
    [item], _ = read_source(tmp_path / "jsonl")
    assert item.message == "it has no text (it is a conversation, and the source's format is not chat)"
    (tmp_path / "parquet").mkdir()
    pq.write_table(pa.Table.from_pylist([{"messages": MESSAGES}]), tmp_path / "parquet/a.parquet")
    [item], _ = read_source(tmp_path / "parquet")
    assert "it has no column 'text'; it has 'messages'; conversations need format chat" in item.message


def test_folder_may_have_both_kinds_of_files(tmp_path):
    write_records(tmp_path / "en/a.jsonl", [PAIR])
    (tmp_path / "de").mkdir()
    pq.write_table(pa.Table.from_pylist([PAIR]), tmp_path / "de/b.parquet")
    (tmp_path / "README.txt").write_text("about it")
    files = find_files(data_spec(tmp_path, format="chat"))
    assert [(file.domain, file.format) for file in files] == [("web/de", "chat"), ("web/en", "chat")]
    (tmp_path / "fr").mkdir()
    (tmp_path / "fr/c.txt").write_text("text")
    with pytest.raises(DataError, match=r"source web/fr: .* has no file of format chat for it"):
        find_files(data_spec(tmp_path, format="chat"))
