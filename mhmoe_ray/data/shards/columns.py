"""The columns of samples, in memory and in shards.

A stored sample has some of the columns in `COLUMNS`, by the kind of its source. T is the sequence length; a decoder's
sample has T + 1 values, of which the first T belong to the model's input and the last T to its targets.

    | column          | value                                    | size in a shard        | samples                |
    | --------------- | ---------------------------------------- | ---------------------- | ---------------------- |
    | tokens          | token id; the largest integer is padding | 2 or 4 bytes per token | decoders, encoders     |
    | targets         | whether the token is a target            | 1 bit per token        | conversations          |
    | document_starts | whether the token begins a document      | 1 bit per token        | conversations          |
    | image           | the source's image file, perhaps empty   | once in a shard        | encoders, vision       |
    | second_image    | the second image file of a sentence      | once in a shard        | encoders               |
    | annotation      | class or objects (images/annotations.py) | JSON                   | vision, questions      |

A decoder's samples with tokens only are a plain array of token ids; others are a structured array with a field for each
column. In text, all tokens except padding are targets, and a start token begins each document. In a conversation, the
start token may also end a turn, so a column marks where documents begin. An encoder's sample has T tokens: the start
token, a text and padding, or padding only.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

Samples = np.ndarray[tuple[int, int], np.dtype[Any]]
"""(samples, T + 1) token ids, or structures with a field for each column."""
StoredColumns = Mapping[str, Any]
"""Columns of stored samples by name: an array (samples, length) of rows of values, or a sequence of values (bytes)."""

TOKENS, TARGETS, DOCUMENT_STARTS = "tokens", "targets", "document_starts"
IMAGE, SECOND_IMAGE, ANNOTATION = "image", "second_image", "annotation"


class Column(NamedTuple):
    """A column of stored samples."""

    values: Literal["tokens", "bits", "bytes"]
    """A row of token ids or of booleans, equally long in all samples of a folder, or one value of any length."""
    is_shared: bool = False
    """Whether a shard stores equal values of any length once."""


COLUMNS = {
    TOKENS: Column("tokens"),
    TARGETS: Column("bits"),
    DOCUMENT_STARTS: Column("bits"),
    IMAGE: Column("bytes", is_shared=True),
    SECOND_IMAGE: Column("bytes", is_shared=True),
    ANNOTATION: Column("bytes"),
}

EXPERT = "expert"
"""Column of the training stream with a sample's expert for router `domain`."""
SAMPLE = "sample"
"""Column of the training stream with a sample's number among those of all domains, for pairs."""


def token_dtype(token_bytes: int) -> np.dtype[np.unsignedinteger]:
    """Return the dtype of stored tokens: little-endian unsigned integers."""
    return np.dtype(f"<u{token_bytes}")


def conversation_dtype(token_bytes: int) -> np.dtype[np.void]:
    """Return the structured dtype of tokens of conversations."""
    return np.dtype([(TOKENS, token_dtype(token_bytes)), (TARGETS, np.bool_), (DOCUMENT_STARTS, np.bool_)])


def token_bytes_for(vocab_size: int) -> int:
    """Return the bytes of a stored token, 2 or 4; the largest value marks padding and is no token id."""
    return 2 if vocab_size < 2**16 else 4


def padding_token(token_bytes: int) -> int:
    """Return the value that marks padding in stored samples."""
    return int(np.iinfo(token_dtype(token_bytes)).max)


def columns_of(rows: np.ndarray) -> dict[str, np.ndarray]:
    """Return the columns by name; plain token ids are `tokens`."""
    if rows.dtype.names is None:
        return {TOKENS: rows}
    return {name: np.ascontiguousarray(rows[name]) for name in rows.dtype.names}


def join_columns(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the samples or tokens with these columns; unknown names are left out."""
    tokens = columns[TOKENS]
    if TARGETS not in columns:
        return tokens
    rows = np.empty(tokens.shape, conversation_dtype(tokens.itemsize))
    for name in (TOKENS, TARGETS, DOCUMENT_STARTS):
        rows[name] = columns[name]
    return rows


def single_token(dtype: np.dtype[Any], token: int, *, starts_document: bool = False) -> np.ndarray:
    """Return one token in the dtype of samples, which is no target."""
    return np.array(token if dtype.names is None else (token, False, starts_document), dtype)


def target_mask(rows: np.ndarray, padding: int) -> np.ndarray:
    """Return a mask of the tokens that are targets of the loss."""
    mask: np.ndarray = rows != padding if rows.dtype.names is None else rows[TARGETS]
    return mask


def padding_mask(rows: np.ndarray, padding: int) -> np.ndarray:
    """Return a mask of the tokens that are padding."""
    mask: np.ndarray = columns_of(rows)[TOKENS] == padding
    return mask


def document_start_mask(rows: np.ndarray, start: int) -> np.ndarray:
    """Return a mask of the tokens that begin a document."""
    mask: np.ndarray = rows == start if rows.dtype.names is None else rows[DOCUMENT_STARTS]
    return mask


def with_all_columns(rows: np.ndarray, start: int, padding: int) -> np.ndarray:
    """Return samples or tokens with all three columns."""
    masks = {TARGETS: target_mask(rows, padding), DOCUMENT_STARTS: document_start_mask(rows, start)}
    return join_columns(columns_of(rows) | masks)


class ModelSamples(NamedTuple):
    """Samples in the form in which a decoder takes them."""

    token_ids: np.ndarray
    """(samples, T + 1) int64, with token 0 for padding."""
    target_mask: np.ndarray
    """Targets that count in the loss, (samples, T) bool."""
    document_starts: np.ndarray | None = None
    """Input tokens that begin a document, (samples, T) bool; None if every start token does."""
    experts: np.ndarray | None = None
    """Expert of each sample for router `domain`, (samples,) int64."""


def to_model_samples(samples: Samples, token_bytes: int) -> ModelSamples:
    """Convert stored samples to the input of a decoder."""
    padding = padding_token(token_bytes)
    tokens = columns_of(samples)[TOKENS]
    token_ids = np.where(tokens != padding, tokens, 0).astype(np.int64)
    document_starts = None if samples.dtype.names is None else np.ascontiguousarray(samples[DOCUMENT_STARTS][:, :-1])
    return ModelSamples(token_ids, np.ascontiguousarray(target_mask(samples, padding)[:, 1:]), document_starts)
