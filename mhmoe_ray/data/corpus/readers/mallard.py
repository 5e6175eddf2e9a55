"""Help pages in Mallard, GNOME's XML."""

from collections.abc import Iterator

from lxml import etree

from mhmoe_ray.data.corpus.readers import Document
from mhmoe_ray.data.corpus.readers.blocks import Vocabulary, read_blocks

MALLARD = Vocabulary(
    blocks={"page", "section", "title", "p", "item", "list", "steps", "terms", "note", "quote", "example", "figure"}
    | {"table", "tr", "desc", "synopsis", "listing"},
    preformatted={"screen"},
    skipped={"info", "links", "comment", "media", "revision", "credit"},
    cells={"td", "key"},
)


def read_mallard(page: bytes) -> Iterator[Document]:
    # Entities stay unread: a page needs none, and they can name files.
    root = etree.fromstring(page, etree.XMLParser(resolve_entities=False, no_network=True, remove_comments=True))
    blocks = list(read_blocks(root, MALLARD))
    titles = [b.text for b in blocks if b.tag == "title"]
    yield Document(titles[0] if titles else "", [b.text for b in blocks])
