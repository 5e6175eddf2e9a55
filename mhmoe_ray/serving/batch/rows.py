"""Rows of the input of a batch inference, and their answers.

A row has a `prompt`, which is a text, or `messages`, which are a conversation. The output keeps all keys or columns of
the row, and those of the answer follow.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel

from mhmoe_ray.serving.answer import AnswerPiece
from mhmoe_ray.serving.api.schema import ChosenLogprob, parse_messages
from mhmoe_ray.serving.engine import FinishReason

PROMPT, MESSAGES = "prompt", "messages"
LOGPROBS = "logprobs"
"""Name of the column that answers have only if their scores are requested."""


class RowAnswer(NamedTuple):
    """Answer to a row, or its error: the columns that follow those of the row in the output, in this order."""

    text: str | None = None
    finish_reason: FinishReason | None = None
    prompt_tokens: int | None = None
    """Number of tokens of the prompt; None if it could not be turned into tokens."""
    tokens: int | None = None
    error: str | None = None
    """Reason why the row has no answer."""
    logprobs: list[dict[str, Any]] | None = None
    """Score of each token, as in a chat completion of OpenAI's API."""

    @classmethod
    def from_piece(cls, piece: AnswerPiece, prompt_tokens: int, has_logprobs: bool) -> "RowAnswer":
        """Return the columns of a complete answer."""
        scores = [ChosenLogprob.from_score(score).model_dump() for score in piece.scores] if has_logprobs else None
        return cls(piece.text, piece.finish_reason, prompt_tokens, piece.token_count, None, scores)


def answer_columns(has_logprobs: bool) -> list[str]:
    """Return the names of the columns of an answer."""
    return [name for name in RowAnswer._fields if has_logprobs or name != LOGPROBS]


class AnswerCounts(BaseModel):
    """Numbers of rows, errors and tokens, summed over answers."""

    rows: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    """Number of tokens of the answers."""

    def __add__(self, counts: "AnswerCounts") -> "AnswerCounts":
        return AnswerCounts(**{name: value + getattr(counts, name) for name, value in self})

    @classmethod
    def of_rows(cls, rows: Sequence[Mapping[str, Any]]) -> "AnswerCounts":
        """Count answers in rows that have at least the columns `error`, `prompt_tokens` and `tokens`."""
        return cls(
            rows=len(rows),
            errors=sum(row["error"] is not None for row in rows),
            prompt_tokens=sum(row["prompt_tokens"] or 0 for row in rows),
            tokens=sum(row["tokens"] or 0 for row in rows),
        )


Conversation = list[dict[str, Any]]
"""Chat messages, in the form that chat templates take."""


def parse_row(row: Any) -> str | Conversation:
    """Return the prompt or the conversation of a decoded row (`NumberedRow.value`).

    Neither, both, or one of a wrong type is a ValueError, whose message tells which.
    """
    if not isinstance(row, Mapping):
        raise ValueError("it is not an object with a prompt or messages")
    prompt, messages = row.get(PROMPT), row.get(MESSAGES)
    if prompt is None and messages is None:
        raise ValueError(f"it has neither a {PROMPT!r} nor {MESSAGES!r}")
    if prompt is not None and messages is not None:
        raise ValueError(f"it has both a {PROMPT!r} and {MESSAGES!r}")
    if messages is not None:
        return parse_messages(messages)
    if not isinstance(prompt, str):
        raise ValueError(f"its {PROMPT!r} is not a text")
    try:
        prompt.encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"its {PROMPT!r} holds half a character (a lone surrogate)") from e
    return prompt


def taken_column(names: Collection[str], has_logprobs: bool) -> str | None:
    """Return the first column name of answers that the input has too, if any."""
    return next((name for name in answer_columns(has_logprobs) if name in names), None)
