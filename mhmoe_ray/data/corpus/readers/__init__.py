"""A reader takes a file's bytes and yields the documents in it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """`paragraphs` are cleaned one by one, so what must stay whole (a source file) is a single one."""

    title: str
    paragraphs: list[str]


Reader = Callable[[bytes], Iterator[Document]]
