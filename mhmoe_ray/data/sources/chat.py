"""Reader of conversations in files of JSON lines and Parquet.

A record has `messages`, a list of {role, content}, or a `prompt` and a `completion`, which are a turn of the user and
one of the assistant. Other keys of a record are ignored, as in all formats. A message with an unknown key is refused,
because the key may change what the conversation means.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from mhmoe_ray.data.chat.process import ChatTemplateError
from mhmoe_ray.data.chat.template import ChatTemplate, Message
from mhmoe_ray.data.sources.columns import BatchReader, ColumnError, read_row_groups
from mhmoe_ray.data.sources.items import BadLine, Document, RawFile, Reason, Tally
from mhmoe_ray.data.sources.records import (
    describe_keys,
    json_type,
    named_language,
    read_records,
    text_problem,
)
from mhmoe_ray.data.sources.storage import Storage

PAIR_KEYS = ("prompt", "completion")
_COLUMN_SETS = (["messages"], list(PAIR_KEYS))
ParseRecord = Callable[[int, Any, str, ChatTemplate], Document | BadLine]
"""Function that returns the document in a record from its line, its JSON value, the path of its file and a template."""


def read_chat(
    storage: Storage, file: RawFile, limit: int, tally: Tally, template: ChatTemplate
) -> Iterator[Document | BadLine]:
    """Yield the conversations of a file, and a `BadLine` for each other record and each of more than `limit` bytes.

    A file whose name ends in .parquet is Parquet, any other JSON lines. Of the tally, only `bytes_read` is updated.
    """
    return read_conversations(storage, file, limit, tally, template, conversation_of, _COLUMN_SETS)


def read_conversations(
    storage: Storage,
    file: RawFile,
    limit: int,
    tally: Tally,
    template: ChatTemplate,
    parse: ParseRecord,
    column_sets: Sequence[list[str]],
) -> Iterator[Document | BadLine]:
    """Yield what `parse` returns for each record; a Parquet file must have the columns of one of the sets."""
    if file.path.endswith(".parquet"):
        yield from _read_parquet(storage, file, limit, tally, template, parse, column_sets)
        return
    for record in read_records(storage, file, limit, tally):
        yield record if isinstance(record, BadLine) else parse(record.line, record.fields, file.path, template)


def _read_parquet(
    storage: Storage,
    file: RawFile,
    limit: int,
    tally: Tally,
    template: ChatTemplate,
    parse: ParseRecord,
    column_sets: Sequence[list[str]],
) -> Iterator[Document | BadLine]:
    def read_batch(batch: pa.RecordBatch, first_row: int) -> Iterator[Document | BadLine]:
        # Decoding damaged offsets has crashed pyarrow, so they are checked first.
        batch.validate(full=True)
        for number, fields in enumerate(batch.to_pylist(), start=first_row + 1):
            document = parse(number, fields, file.path, template)
            is_too_long = isinstance(document, Document) and len(document.text.encode()) > limit
            yield BadLine(file.path, number, Reason.TOO_LONG) if is_too_long else document

    def open_reader(schema: pa.Schema) -> tuple[list[str], BatchReader]:
        columns = next((names for names in column_sets if set(names) <= set(schema.names)), None)
        if columns is None:
            found_keys = describe_keys(dict.fromkeys(schema.names))
            needed_keys = ", nor ".join(" and ".join(map(repr, names)) for names in column_sets)
            raise ColumnError(f"it has no column {needed_keys}, among {found_keys}")
        return columns, read_batch

    return read_row_groups(storage, file, tally, open_reader)


def conversation_of(line: int, fields: Any, path: str, template: ChatTemplate) -> Document | BadLine:
    """Return the conversation in a record, which may be any JSON value, or a `BadLine` with the reason."""
    try:
        messages = parse_messages(fields)
    except MalformedRecordError as e:
        return BadLine(path, line, Reason.NO_CONVERSATION, str(e))
    text = "\n".join(message["content"] for message in messages)
    if reason := text_problem(text):
        return BadLine(path, line, reason)
    try:
        conversation = template.render_conversation(messages)
        if not conversation.spans:
            raise ChatTemplateError("it renders no text of the assistant")
    except ChatTemplateError as e:
        return BadLine(path, line, Reason.NO_RENDERING, str(e))
    # The rendered text is checked, too, because a template may also render the names and roles of messages.
    if reason := text_problem(conversation.text):
        return BadLine(path, line, reason)
    return Document(text, line, named_language(fields), conversation)


class MalformedRecordError(Exception):
    """Error for a record that is not a conversation; its message is the reason."""


def parse_messages(fields: Any) -> list[Message]:
    """Return the checked messages of a record, which may be any JSON value.

    A record that is no conversation, or has no turn of the assistant, is a MalformedRecordError.
    """
    if not isinstance(fields, dict):
        raise MalformedRecordError(f"it is {json_type(fields)}, not an object")
    # Records with `messages` often repeat the first message as `prompt`, so `messages` takes precedence.
    if "messages" in fields:
        entries = fields["messages"]
        if not isinstance(entries, list):
            raise MalformedRecordError(f"'messages' is {json_type(entries)}, not a list")
    elif fields.keys() >= set(PAIR_KEYS):
        entries = [
            {"role": role, "content": fields[key]} for role, key in zip(("user", "assistant"), PAIR_KEYS, strict=True)
        ]
    else:
        raise MalformedRecordError(f"no 'messages', nor 'prompt' and 'completion', among {describe_keys(fields)}")
    messages = [parse_message(entry, number) for number, entry in enumerate(entries, start=1)]
    if not any(message["role"] == "assistant" for message in messages):
        raise MalformedRecordError("it has no message of the role assistant")
    return messages


def parse_message(entry: Any, number: int) -> Message:
    """Return message `number` (from 1) without null keys; an incomplete or unknown form is a MalformedRecordError."""
    if not isinstance(entry, dict):
        raise MalformedRecordError(f"message {number} is {json_type(entry)}, not an object")
    # In a Parquet file all messages have the same keys, and the value is null where a message lacks the key.
    message = {key: value for key, value in entry.items() if value is not None}
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            kind = json_type(entry[key]) if key in entry else "missing"
            raise MalformedRecordError(f"the {key} of message {number} is {kind}, not a string")
    if unknown_keys := message.keys() - {"role", "content", "name"}:
        raise MalformedRecordError(f"message {number} has {describe_keys(dict.fromkeys(unknown_keys))}, not supported")
    if message["role"] == "assistant" and not message["content"].strip():
        raise MalformedRecordError(f"message {number}, of the assistant, is empty")
    return message
