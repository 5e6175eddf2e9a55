"""Readers of packages' files: each takes a file's bytes and yields the documents in it.

HTML manuals, Mallard (GNOME's help in XML), dictionaries of the DICT protocol's server, and source files, filtered as
RedPajama filters GitHub's.
"""

import re
import textwrap
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from lxml import etree


@dataclass(frozen=True)
class Document:
    """`paragraphs` are cleaned one by one, so what must stay whole (a source file) is a single one."""

    title: str
    paragraphs: list[str]


Reader = Callable[[bytes], Iterator[Document]]


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


def read_blocks(root: "etree._Element", words: Vocabulary) -> Iterator[Block]:
    """The text below `root` in reading order, a block for each paragraph, heading, item or code listing."""
    open_blocks, text, verbatim = [_name(root)], list[str](), 0
    # A walk by events, because hand-made pages nest deeper than Python recurses.
    # Imported only here: the small sample is made without lxml, which is in the extra `large-sample`.
    from lxml import etree

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


def _name(element: "etree._Element") -> str:
    return element.tag.rpartition("}")[2] if isinstance(element.tag, str) else ""


HEADINGS = frozenset({"h1", "h2", "h3", "h4", "h5", "h6"})
HTML = Vocabulary(
    blocks=HEADINGS
    | {"address", "article", "aside", "blockquote", "body", "caption", "center", "dd", "details", "div", "dl", "dt"}
    | {
        "figcaption",
        "figure",
        "hr",
        "li",
        "main",
        "ol",
        "p",
        "section",
        "summary",
        "table",
        "tbody",
        "thead",
        "tr",
        "ul",
    },
    preformatted={"pre"},
    skipped={
        "script",
        "style",
        "noscript",
        "nav",
        "header",
        "footer",
        "form",
        "button",
        "svg",
        "math",
        "select",
        "head",
    },
    breaks={"br"},
    cells={"td", "th"},
)
_NUMBER = re.compile(r"^[A-Z]?[\d.]+\s+")


def pages(content: str, without: str = "") -> Reader:
    """A page is a document.

    Args:
        content: XPath of the element that holds the text; pages without it (indexes, frames) are passed over.
        without: XPath of what is no text within it, such as links to the next page.
    """

    def read(page: bytes) -> Iterator[Document]:
        title, blocks = _page(page, content, without)
        if blocks:
            yield Document(title, [b.text for b in blocks])

    return read


def questions(content: str, without: str = "") -> Reader:
    """A heading that asks and what follows it until the next heading are a document, in the form "Q: ... A: ..."."""

    def read(page: bytes) -> Iterator[Document]:
        title, blocks = _page(page, content, without)
        question, answer = title, list[str]()
        for block in [*blocks, Block("h1", "")]:
            if block.tag not in HEADINGS:
                answer.append(block.text)
                continue
            if question.endswith("?") and answer:
                yield Document(question, [f"Q: {question}", f"A: {answer[0]}", *answer[1:]])
            question, answer = _NUMBER.sub("", block.text), []

    return read


def _page(page: bytes, content: str, without: str) -> tuple[str, list[Block]]:
    # Imported only here: the small sample is made without lxml, which is in the extra `large-sample`.
    import lxml.html
    from lxml import etree

    try:
        page.decode("utf-8")
        encoding = "utf-8"
    except UnicodeDecodeError:
        encoding = None  # the page's own declaration
    try:
        tree = lxml.html.document_fromstring(page, parser=lxml.html.HTMLParser(encoding=encoding, remove_comments=True))
    except etree.ParserError:  # nothing in it
        return "", []
    found = tree.xpath(content)
    if not found:
        return "", []
    for element in found[0].xpath(without) if without else ():
        element.drop_tree()
    title = _NUMBER.sub("", " ".join((tree.findtext(".//title") or "").split()))
    return title, list(read_blocks(found[0], HTML))


MALLARD = Vocabulary(
    blocks={"page", "section", "title", "p", "item", "list", "steps", "terms", "note", "quote", "example", "figure"}
    | {"table", "tr", "desc", "synopsis", "listing"},
    preformatted={"screen"},
    skipped={"info", "links", "comment", "media", "revision", "credit"},
    cells={"td", "key"},
)


def read_mallard(page: bytes) -> Iterator[Document]:
    # Entities stay unread: a page needs none, and they can name files.
    # Imported only here: the small sample is made without lxml, which is in the extra `large-sample`.
    from lxml import etree

    root = etree.fromstring(page, etree.XMLParser(resolve_entities=False, no_network=True, remove_comments=True))
    blocks = list(read_blocks(root, MALLARD))
    titles = [b.text for b in blocks if b.tag == "title"]
    yield Document(titles[0] if titles else "", [b.text for b in blocks])


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


_ABOUT_RIGHTS = re.compile(r"copyright|licen[cs]e|SPDX", re.IGNORECASE)
_COMMENT_LINES = re.compile(r"\A(?:[ \t]*(?://|#).*\n)+\s*")
_COMMENT_BLOCK = re.compile(r"\A\s*/\*.*?\*/\s*", re.DOTALL)


def read_code(content: bytes) -> Iterator[Document]:
    """The file as one paragraph, without the notice of its rights at the top, if it is worth reading."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return
    for first in (_COMMENT_BLOCK, _COMMENT_LINES):
        found = first.match(text)
        if found and _ABOUT_RIGHTS.search(found[0]):
            text = text[found.end() :]
    if worth_reading(text):
        yield Document("", [text.strip("\n")])


def worth_reading(text: str) -> bool:
    """No line over 1,000 characters, at most 100 on average, a quarter of them letters or digits."""
    lengths = [len(line) for line in text.splitlines()] or [0]
    return (
        len(text) >= 200
        and max(lengths) <= 1000
        and sum(lengths) <= 100 * len(lengths)
        and sum(c.isalnum() for c in text) >= len(text) / 4
    )
