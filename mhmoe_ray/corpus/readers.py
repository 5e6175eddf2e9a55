"""Readers of packages' files, which take a file's bytes and yield the documents in it.

There are readers of HTML manuals, of Mallard (GNOME's help in XML), of dictionaries of the DICT protocol's server, and
of source files, which are filtered as RedPajama filters GitHub's files.

Functions that need lxml import it themselves. The small sample is made without lxml, which is in the extra
`large-sample`.
"""

import re
import textwrap
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from mhmoe_ray.errors import DataError

if TYPE_CHECKING:
    from lxml import etree


@dataclass(frozen=True)
class CorpusDocument:
    """A document of a sample corpus; its title may be empty.

    Attributes:
        paragraphs: parts of the text that `Cleaner` keeps or drops as a whole; a source file is one paragraph.
    """

    title: str
    paragraphs: list[str]


Reader = Callable[[bytes], Iterator[CorpusDocument]]
"""Function from the content of a file to the documents in it."""


class PageBlock(NamedTuple):
    """A paragraph, heading, item or code listing of a page, with the name of its element."""

    tag: str
    text: str


@dataclass(frozen=True)
class Vocabulary:
    """Elements of a markup language, without namespaces, that have a role in the extraction of text.

    Text in any other element is part of the text around that element.

    Attributes:
        blocks: elements whose beginning and end separate blocks of text.
        preformatted: elements whose line breaks and indentation are kept.
        skipped: elements whose text is left out.
        breaks: elements that end a line in preformatted text, and a block in other text.
        cells: elements before whose text a space is inserted.
    """

    blocks: Collection[str]
    preformatted: Collection[str]
    skipped: Collection[str]
    breaks: Collection[str] = ()
    cells: Collection[str] = ()


def read_blocks(root: "etree._Element", vocabulary: Vocabulary) -> Iterator[PageBlock]:
    """Yield the text of an element and all elements in it as blocks, in reading order."""
    from lxml import etree

    open_blocks, pieces, preformatted_depth = [_local_name(root)], list[str](), 0
    # Some pages nest elements deeper than Python can recurse, so the walk is a loop over events.
    walk = etree.iterwalk(root, events=("start", "end", "comment", "pi"))
    for event, element in walk:
        tag = _local_name(element)
        is_block_edge = (tag in vocabulary.blocks or tag in vocabulary.preformatted) and event in ("start", "end")
        if is_block_edge or tag in vocabulary.breaks:
            if preformatted_depth and tag in vocabulary.breaks:
                pieces.append("\n" if event == "end" else "")
            else:
                yield from _finish_block(open_blocks[-1], pieces, preformatted_depth > 0)
        if event == "start":
            if tag in vocabulary.skipped:
                walk.skip_subtree()
                continue
            if is_block_edge:
                open_blocks.append(tag)
                preformatted_depth += tag in vocabulary.preformatted
            if tag in vocabulary.cells:
                pieces.append(" ")
            pieces.append(element.text or "")
            continue
        # A skipped element has an end event although it opened no block, so it must not close one.
        if event == "end" and is_block_edge and tag not in vocabulary.skipped:
            open_blocks.pop()
            preformatted_depth -= tag in vocabulary.preformatted
        if element is not root:
            pieces.append(element.tail or "")
    yield from _finish_block(open_blocks[-1], pieces, False)


def _finish_block(tag: str, pieces: list[str], is_preformatted: bool) -> Iterator[PageBlock]:
    """Join and clear `pieces`, and yield the block unless it is blank.

    White space becomes single spaces; preformatted text keeps its line breaks and is dedented.
    """
    text = "".join(pieces)
    pieces.clear()
    if is_preformatted:
        lines = [line.rstrip() for line in textwrap.dedent(text.expandtabs(4)).splitlines()]
        text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")
    else:
        text = " ".join(text.split())
    if text.strip():
        yield PageBlock(tag, text)


def _local_name(element: "etree._Element") -> str:
    # The tag of a comment or of a processing instruction is a function and not a string, so its name is empty.
    return element.tag.rpartition("}")[2] if isinstance(element.tag, str) else ""


HEADING_TAGS = frozenset({"h1", "h2", "h3", "h4", "h5", "h6"})
_HTML_BLOCKS = (
    "address article aside blockquote body caption center dd details div dl dt figcaption figure hr li main ol p "
    "section summary table tbody thead tr ul"
)
_HTML_SKIPPED = "script style noscript nav header footer form button svg math select head"
HTML = Vocabulary(
    blocks=HEADING_TAGS.union(_HTML_BLOCKS.split()),
    preformatted={"pre"},
    skipped=_HTML_SKIPPED.split(),
    breaks={"br"},
    cells={"td", "th"},
)
# Number that stands before the text of a heading in a manual, as in "2.1. Ports" or "B.2 What is it?".
_SECTION_NUMBER = re.compile(r"^[A-Z]?[\d.]+\s+")


def page_reader(content_xpath: str, excluded_xpath: str = "") -> Reader:
    """Return a reader of HTML pages that makes a document of each page.

    Pages without an element at `content_xpath` (indexes, frames) are skipped, and so are the elements at
    `excluded_xpath` within it, such as links to the next page.
    """

    def read_page(page: bytes) -> Iterator[CorpusDocument]:
        title, blocks = _parse_page(page, content_xpath, excluded_xpath)
        if blocks:
            yield CorpusDocument(title, [b.text for b in blocks])

    return read_page


def question_reader(content_xpath: str, excluded_xpath: str = "") -> Reader:
    """Return a reader of HTML pages that makes a document of each question, in the form "Q: ... A: ...".

    A question is a heading with a question mark, and the text until the next heading is its answer.
    """

    def read_page(page: bytes) -> Iterator[CorpusDocument]:
        title, blocks = _parse_page(page, content_xpath, excluded_xpath)
        question, answer = title, list[str]()
        # Only a heading finishes the question before it, so an empty heading is added at the end for the last question.
        for block in [*blocks, PageBlock("h1", "")]:
            if block.tag not in HEADING_TAGS:
                answer.append(block.text)
                continue
            if question.endswith("?") and answer:
                yield CorpusDocument(question, [f"Q: {question}", f"A: {answer[0]}", *answer[1:]])
            question, answer = _SECTION_NUMBER.sub("", block.text), []

    return read_page


def _parse_page(page: bytes, content_xpath: str, excluded_xpath: str) -> tuple[str, list[PageBlock]]:
    """Return an HTML page's title and the blocks in the element at `content_xpath`; both are empty without it."""
    import lxml.html
    from lxml import etree

    try:
        page.decode("utf-8")
        encoding = "utf-8"
    except UnicodeDecodeError:
        # Without an encoding, the parser uses the one that the page declares.
        encoding = None
    try:
        tree = lxml.html.document_fromstring(page, parser=lxml.html.HTMLParser(encoding=encoding, remove_comments=True))
    except etree.ParserError:
        # lxml raises this error if the page is empty.
        return "", []
    content_elements = tree.xpath(content_xpath)
    if not content_elements:
        return "", []
    for element in content_elements[0].xpath(excluded_xpath) if excluded_xpath else ():
        element.drop_tree()
    title = _SECTION_NUMBER.sub("", " ".join((tree.findtext(".//title") or "").split()))
    return title, list(read_blocks(content_elements[0], HTML))


MALLARD = Vocabulary(
    blocks={"page", "section", "title", "p", "item", "list", "steps", "terms", "note", "quote", "example", "figure"}
    | {"table", "tr", "desc", "synopsis", "listing"},
    preformatted={"screen"},
    skipped={"info", "links", "comment", "media", "revision", "credit"},
    cells={"td", "key"},
)


def read_mallard(page: bytes) -> Iterator[CorpusDocument]:
    """Yield the one document of a page in Mallard; DataError if the page is not XML."""
    from lxml import etree

    # Entities are not resolved: a page needs none, and an entity could name a file of this machine.
    parser = etree.XMLParser(resolve_entities=False, no_network=True, remove_comments=True)
    try:
        root = etree.fromstring(page, parser)
    except etree.XMLSyntaxError as e:
        raise DataError("page in Mallard", f"it is not XML ({e})", "delete its package from the cache") from e
    blocks = list(read_blocks(root, MALLARD))
    titles = [b.text for b in blocks if b.tag == "title"]
    yield CorpusDocument(titles[0] if titles else "", [b.text for b in blocks])


_DATE = re.compile(r"\(\d{4}-\d\d-\d\d\)")


def read_dictionary(content: bytes) -> Iterator[CorpusDocument]:
    """Yield a document for each entry of a file of the DICT server, except for entries about the dictionary itself.

    An entry begins with a line that is not indented, its headword.
    """
    for entry in re.split(r"\n(?=\S)", content.decode("utf-8", errors="replace")):
        headword, _, body = entry.partition("\n")
        # Entries with such names describe the dictionary itself, so they are skipped.
        if headword.startswith("00-database"):
            continue
        # Braces and dates are removed, because they are not part of the text: braces mark references to other entries,
        # and a date says when an editor last changed the entry.
        body = _DATE.sub("", body.replace("{", "").replace("}", ""))
        paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", body)]
        yield CorpusDocument(headword, [headword, *filter(None, paragraphs)])


_LICENSE_WORDS = re.compile(r"copyright|licen[cs]e|SPDX", re.IGNORECASE)
_COMMENT_LINES = re.compile(r"\A(?:[ \t]*(?://|#).*\n)+\s*")
_COMMENT_BLOCK = re.compile(r"\A\s*/\*.*?\*/\s*", re.DOTALL)


def read_code(content: bytes) -> Iterator[CorpusDocument]:
    """Yield a source file as one document of one paragraph, without the licence notice at its top.

    A file that is not UTF-8, or that `is_worth_reading` rejects, yields nothing.
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return
    for notice_pattern in (_COMMENT_BLOCK, _COMMENT_LINES):
        match = notice_pattern.match(text)
        if match and _LICENSE_WORDS.search(match[0]):
            text = text[match.end() :]
    if is_worth_reading(text):
        yield CorpusDocument("", [text.strip("\n")])


def is_worth_reading(text: str) -> bool:
    """Return whether a source file is long enough and looks as if a person wrote it.

    It has at least 200 characters, of which at least a quarter are letters or digits. Its lines have at most 1,000
    characters, and at most 100 on average.
    """
    # The limits on lines and on letters and digits are those that RedPajama filters GitHub's files with.
    lengths = [len(line) for line in text.splitlines()] or [0]
    return (
        len(text) >= 200
        and max(lengths) <= 1000
        and sum(lengths) <= 100 * len(lengths)
        and sum(c.isalnum() for c in text) >= len(text) / 4
    )
