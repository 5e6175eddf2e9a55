"""Packed training samples decoded to text: what the model sees, in the order in which it sees it."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mhmoe_ray.data.shards.files import padding_token
from mhmoe_ray.data.stream import TrainingSamples
from mhmoe_ray.data.tokenizer import boundaries, load_tokenizer
from mhmoe_ray.errors import DataError
from mhmoe_ray.spec import RunSpec


@dataclass
class Part:
    """A document, or the piece of it that lies in the sample."""

    begins: bool
    """Whether the piece starts with the document's start token; else it continues from the sample before."""
    tokens: int
    text: str


@dataclass
class Shown:
    position: int
    """Position of the sample in the whole training, from 0."""
    step: int
    domain: str
    sample: int
    """Number of the sample within its domain, from 0."""
    parts: list[Part]
    padding: int
    """Number of padding tokens at the end of the sample."""


def decoded(spec: RunSpec, start: int, count: int) -> list[Shown]:
    """Return samples start .. start + count - 1 of a training as text; the last token of each is a target only.

    Raises:
        DataError: the data are not prepared, or the training has no such positions.
    """
    there = spec.train.steps * spec.samples_per_step
    if not 0 <= start <= start + count <= there:
        fix = f"ask for positions from 0 to {there - 1:,}"
        raise DataError(f"samples {start:,} to {start + count - 1:,}", f"the training has {there:,}", fix)
    samples = TrainingSamples(spec)
    tokenizer = load_tokenizer(spec.data.prepared / "tokenizer.json", spec.model.vocab_size)
    begin, padding = boundaries(tokenizer).start, padding_token(samples.token_bytes)
    shown, positions = [], range(start, start + count)
    for position, row in zip(positions, samples.read(np.array(positions, np.int64)), strict=True):
        real = row[row != padding].tolist()
        starts = [at for at, token in enumerate(real) if token == begin]
        cuts = sorted({0, *starts, len(real)})
        parts = []
        for a, b in pairwise(cuts):
            begins = real[a] == begin
            text = tokenizer.decode(real[a + begins : b], skip_special_tokens=False)
            parts.append(Part(begins, b - a, text))
        domain, sample = samples.place(position)
        step = position // spec.samples_per_step
        shown.append(Shown(position, step, domain, sample, parts, len(row) - len(real)))
    return shown
