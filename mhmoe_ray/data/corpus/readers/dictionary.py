"""Dictionaries of the DICT protocol's server: headwords at the margin, their text below them, indented."""

import re
from collections.abc import Iterator

from mhmoe_ray.data.corpus.readers import Document

_DATE = re.compile(r"\(\d{4}-\d\d-\d\d\)")


def read_dictionary(content: bytes) -> Iterator[Document]:
    """An entry is a document."""
    for entry in re.split(r"\n(?=\S)", content.decode("utf-8", errors="replace")):
        head, _, body = entry.partition("\n")
        if head.startswith("00-database"):  # about the dictionary itself
            continue
        # Braces mark references to other entries; a date says when an editor last touched the entry.
        body = _DATE.sub("", body.replace("{", "").replace("}", ""))
        paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", body)]
        yield Document(head, [head, *filter(None, paragraphs)])
