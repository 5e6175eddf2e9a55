"""Streams of tokens made by the tests."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mhmoe_ray.data.prepare.parts import PartRef, Stream, part_file

START = 1


def stream_of(folder: Path, parts: Sequence[np.ndarray], token_bytes: int = 2) -> Stream:
    """Write these tokens as parts on disk, and return them as a stream."""
    refs = []
    for i, tokens in enumerate(parts):
        name = f"{i:02d}part"
        path = part_file(folder, name)
        path.parent.mkdir(exist_ok=True)
        # What does not belong to the stream lies around it.
        np.concatenate([[7], tokens, [7, 7]]).astype(f"<u{token_bytes}").tofile(path)
        refs.append(PartRef(name, 1, 1 + len(tokens)))
    return Stream(folder, refs, token_bytes)


def documents_of(lengths: Sequence[int]) -> list[list[int]]:
    """Return documents of these numbers of tokens, each preceded by START; no two tokens are alike."""
    made, next_token = [], START + 1
    for n in lengths:
        made.append([START, *range(next_token, next_token + n)])
        next_token += n
    return made
