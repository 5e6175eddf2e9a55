"""Packed training samples decoded to text: the input of the model, in the order of the training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from operator import itemgetter

import numpy as np

from mhmoe_ray.data.samples import TrainingSamples
from mhmoe_ray.data.shards.columns import (
    TARGETS,
    TOKENS,
    columns_of,
    document_start_mask,
    padding_mask,
    padding_token,
    target_mask,
)
from mhmoe_ray.data.shards.manifest import TOKENIZER_FILE
from mhmoe_ray.data.tokenizer import boundaries, load_tokenizer
from mhmoe_ray.errors import DataError
from mhmoe_ray.spec import RunSpec


@dataclass
class TextPiece:
    """Stretch of a conversation's text, in which either all tokens are targets or none is."""

    is_target: bool
    text: str


@dataclass
class SamplePart:
    """Document, or piece of a document, that is packed into one sample."""

    begins: bool
    """True if the piece starts with the start token; otherwise the document begins in another sample."""
    tokens: int
    """Number of tokens, including the start token."""
    text: str
    """Text without the start token."""
    offset: int
    """Place of its first token in the sample."""
    targets: int
    """Tokens that count in the loss and are predicted from the piece; its last one predicts the next piece's start."""
    pieces: list[TextPiece] | None = None
    """Text of a conversation, cut where targets begin and end; None without conversations, when all text is targets."""


@dataclass
class DecodedSample:
    """Packed training sample, decoded to text."""

    position: int
    """Position in the whole training, from 0."""
    step: int
    """Training step that reads the sample, from 0."""
    domain: str
    sample: int
    """Number within its domain, from 0."""
    parts: list[SamplePart]
    padding: int
    """Number of padding tokens at the end."""


def decode_samples(
    spec: RunSpec, positions: Sequence[int], samples_before: Mapping[str, int] | None = None
) -> list[DecodedSample]:
    """Return the training samples at some positions, decoded to text.

    `positions` are sorted. The text includes the last token of a sample, which is a target but never an input.
    `samples_before` has the samples of each domain that earlier runs have read, if this run continues their order
    (`compute_mixture`). Data that are not prepared, or positions outside of the training, are a DataError.
    """
    position_count = spec.train.steps * spec.samples_per_step
    if not 0 <= positions[0] <= positions[-1] < position_count:
        fix = f"ask for positions from 0 to {position_count - 1:,}"
        raise DataError(f"samples {positions[0]:,} to {positions[-1]:,}", f"the training has {position_count:,}", fix)
    samples = TrainingSamples(spec, samples_before)
    tokenizer = load_tokenizer(spec.data.prepared / TOKENIZER_FILE, spec.model.text_vocab_size)
    start_token, padding = boundaries(tokenizer).start, padding_token(samples.token_bytes)
    decoded_samples, rows = [], samples.read(np.array(positions, np.int64))
    for position, (domain, sample), row in zip(positions, samples.locate_samples(positions), rows, strict=True):
        length = int((~padding_mask(row, padding)).sum())
        token_ids = columns_of(row)[TOKENS][:length].tolist()
        mask = target_mask(row, padding)
        targets = None if row.dtype.names is None else row[TARGETS][:length]
        starts = np.flatnonzero(document_start_mask(row[:length], start_token)).tolist()
        # A sample may begin within a document, so its first piece begins at 0 even without a start token.
        cuts = sorted({0, *starts, len(token_ids)})
        parts = []
        for piece_start, piece_end in pairwise(cuts):
            begins = piece_start in starts
            span = slice(piece_start + begins, piece_end)
            text = tokenizer.decode(token_ids[span], skip_special_tokens=False)
            target_count = int(mask[piece_start + 1 : piece_end + 1].sum())
            part = SamplePart(begins, piece_end - piece_start, text, piece_start, target_count)
            if targets is not None:
                tokens = zip(token_ids[span], targets[span].tolist(), strict=True)
                part.pieces = [
                    TextPiece(is_target, tokenizer.decode([token for token, _ in group], skip_special_tokens=False))
                    for is_target, group in groupby(tokens, itemgetter(1))
                ]
            parts.append(part)
        step = position // spec.samples_per_step
        decoded_samples.append(DecodedSample(position, step, domain, sample, parts, len(row) - len(token_ids)))
    return decoded_samples
