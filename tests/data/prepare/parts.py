"""Documents of tokens, and streams of tokens on disk, for tests."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mhmoe_ray.data.prepare.parts import PartSlice, TokenStream, part_file
from mhmoe_ray.data.shards.columns import token_dtype

START = 1


def write_stream(folder: Path, parts: Sequence[np.ndarray], token_bytes: int = 2) -> TokenStream:
    """Write tokens as parts on disk, and return the stream of the parts."""
    part_slices = []
    for i, tokens in enumerate(parts):
        name = f"{i:02d}part"
        path = part_file(folder, name)
        path.parent.mkdir(exist_ok=True)
        # The file also has tokens before and after the slice, which do not belong to the stream and must not be read.
        np.concatenate([[7], tokens, [7, 7]]).astype(f"<u{token_bytes}").tofile(path)
        part_slices.append(PartSlice(name, 1, 1 + len(tokens)))
    return TokenStream(folder, part_slices, token_dtype(token_bytes))


def make_documents(lengths: Sequence[int]) -> list[list[int]]:
    """Return documents of START and as many tokens as each length says; no other token occurs twice."""
    documents, next_token = [], START + 1
    for n in lengths:
        documents.append([START, *range(next_token, next_token + n)])
        next_token += n
    return documents
