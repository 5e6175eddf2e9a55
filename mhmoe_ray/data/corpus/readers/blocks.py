"""Paragraphs out of a tree of markup, whatever the vocabulary."""

import re
import textwrap
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from lxml import etree


class Block(NamedTuple):
    tag: str
    text: str


@dataclass(frozen=True)
class Vocabulary:
    """What elements mean, by local name. All that is not named here runs on within its paragraph."""

    blocks: Collection[str]
    preformatted: Collection[str]
    skipped: Collection[str]
    breaks: Collection[str] = ()
    cells: Collection[str] = ()


def read_blocks(root: etree._Element, words: Vocabulary) -> Iterator[Block]:
    """The text below `root` in reading order, a block for each paragraph, heading, item or code listing."""
    open_blocks, text, verbatim = [_name(root)], list[str](), 0
    # A walk by events, because hand-made pages nest deeper than Python recurses.
    walk = etree.iterwalk(root, events=("start", "end", "comment", "pi"))
    for event, element in walk:
        tag = _name(element)
        starts_or_ends = (tag in words.blocks or tag in words.preformatted) and event in ("start", "end")
        if starts_or_ends or tag in words.breaks:
            if verbatim and tag in words.breaks:
                text.append("\n" if event == "end" else "")
            else:
                yield from _paragraph(open_blocks[-1], text, verbatim > 0)
        if event == "start":
            if tag in words.skipped:
                walk.skip_subtree()
                continue
            if starts_or_ends:
                open_blocks.append(tag)
                verbatim += tag in words.preformatted
            if tag in words.cells:
                text.append(" ")
            text.append(element.text or "")
            continue
        if event == "end" and starts_or_ends and tag not in words.skipped:
            open_blocks.pop()
            verbatim -= tag in words.preformatted
        if element is not root:
            text.append(element.tail or "")
    yield from _paragraph(open_blocks[-1], text, False)


def _paragraph(tag: str, pieces: list[str], verbatim: bool) -> Iterator[Block]:
    text = "".join(pieces)
    pieces.clear()
    if verbatim:
        lines = [line.rstrip() for line in textwrap.dedent(text.expandtabs(4)).splitlines()]
        text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")
    else:
        text = " ".join(text.split())
    if text.strip():
        yield Block(tag, text)


def _name(element: etree._Element) -> str:
    return element.tag.rpartition("}")[2] if isinstance(element.tag, str) else ""
