"""Reader of pairs: a chosen and a rejected answer to the same prompt, in files of JSON lines and Parquet.

A record has `prompt`, `chosen` and `rejected`, each a text or a list of messages. A text is a turn of the user or of
the assistant. Lists of answers that begin with another role than the assistant's are whole conversations; their prompt
is the beginning that they share, and the key `prompt` is not needed. Only the turns after the prompt are targets.
"""

from collections.abc import Iterator
from itertools import takewhile
from typing import Any

from mhmoe_ray.data.chat.process import ChatTemplateError
from mhmoe_ray.data.chat.template import ChatTemplate, Message, RenderedConversation
from mhmoe_ray.data.sources.chat import MalformedRecordError, parse_message, read_conversations
from mhmoe_ray.data.sources.items import BadLine, Document, RawFile, Reason, Tally
from mhmoe_ray.data.sources.records import describe_keys, json_type, named_language, text_problem
from mhmoe_ray.data.sources.storage import Storage

ANSWER_KEYS = ("chosen", "rejected")
_COLUMN_SETS = (["prompt", *ANSWER_KEYS], [*ANSWER_KEYS])


def read_preferences(
    storage: Storage, file: RawFile, limit: int, tally: Tally, template: ChatTemplate
) -> Iterator[Document | BadLine]:
    """Yield the pairs of a file, and a `BadLine` for each other record, as `read_chat` does."""
    return read_conversations(storage, file, limit, tally, template, pair_of, _COLUMN_SETS)


def pair_of(line: int, fields: Any, path: str, template: ChatTemplate) -> Document | BadLine:
    """Return the pair in a record, which may be any JSON value, or a `BadLine` with the reason."""
    try:
        prompt, answers = parse_pair(fields)
    except MalformedRecordError as e:
        return BadLine(path, line, Reason.NO_PAIR, str(e))
    text = "\n".join(message["content"] for messages in (prompt, *answers) for message in messages)
    if reason := text_problem(text):
        return BadLine(path, line, reason)
    try:
        conversations = [_render(template, prompt, answer) for answer in answers]
    except ChatTemplateError as e:
        return BadLine(path, line, Reason.NO_RENDERING, str(e))
    for conversation in conversations:
        if reason := text_problem(conversation.text):
            return BadLine(path, line, reason)
    return Document(text, line, named_language(fields), conversations[0], rejected=conversations[1])


def _render(template: ChatTemplate, prompt: list[Message], answer: list[Message]) -> RenderedConversation:
    conversation = template.render_conversation([*prompt, *answer])
    turns = sum(message["role"] == "assistant" for message in prompt)
    spans = conversation.spans[turns:]
    if not spans:
        raise ChatTemplateError("it renders no text of an answer")
    return conversation._replace(spans=spans)


def parse_pair(fields: Any) -> tuple[list[Message], list[list[Message]]]:
    """Return the prompt, and the chosen and the rejected answer after it; another record is a MalformedRecordError."""
    if not isinstance(fields, dict):
        raise MalformedRecordError(f"it is {json_type(fields)}, not an object")
    if not fields.keys() >= set(ANSWER_KEYS):
        raise MalformedRecordError(f"no 'chosen' and 'rejected' among {describe_keys(fields)}")
    answers = [_parse_messages(fields, key, "assistant") for key in ANSWER_KEYS]
    if all(answer[0]["role"] != "assistant" for answer in answers):
        shared = takewhile(lambda messages: messages[0] == messages[1], zip(*answers, strict=False))
        prompt = [message for message, _ in shared]
        answers = [answer[len(prompt) :] for answer in answers]
    else:
        prompt = _parse_messages(fields, "prompt", "user")
    if not prompt:
        raise MalformedRecordError("'chosen' and 'rejected' share no first message")
    if answers[0] == answers[1]:
        raise MalformedRecordError("'chosen' and 'rejected' are equal")
    for key, answer in zip(ANSWER_KEYS, answers, strict=True):
        if not any(message["role"] == "assistant" for message in answer):
            raise MalformedRecordError(f"{key!r} has no message of the role assistant after the prompt")
    return prompt, answers


def _parse_messages(fields: dict[str, Any], key: str, role: str) -> list[Message]:
    value = fields.get(key)
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        kind = json_type(value) if key in fields else "missing"
        raise MalformedRecordError(f"{key!r} is {'empty' if value == [] else kind}, not a text or a list of messages")
    try:
        return [parse_message(entry, number) for number, entry in enumerate(value, start=1)]
    except MalformedRecordError as e:
        raise MalformedRecordError(f"{key!r}: {e}") from e
