"""Manuals written as web pages."""

import re
from collections.abc import Iterator

import lxml.html
from lxml import etree

from mhmoe_ray.data.corpus.readers import Document, Reader
from mhmoe_ray.data.corpus.readers.blocks import Block, Vocabulary, read_blocks

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
