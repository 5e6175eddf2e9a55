"""Makers of small drawings for tests: PNG and SVG files, a font of coloured squares, tables of emoji, and shards."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL")
font_builder = pytest.importorskip("fontTools.fontBuilder")

from fontTools.feaLib.builder import addOpenTypeFeaturesFromString  # noqa: E402
from fontTools.pens.ttGlyphPen import TTGlyphPen  # noqa: E402
from PIL import Image  # noqa: E402


def png_file(size: tuple[int, int], colour: tuple[int, ...], mode: str = "RGBA") -> bytes:
    """Return a PNG file of one colour."""
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def svg_file(colour: str, width: float = 10, height: float = 10) -> bytes:
    """Return an SVG file of a rectangle of one colour that fills the drawing."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">'
        f'<rect width="{width}" height="{height}" fill="{colour}"/></svg>'
    ).encode()


def emoji_font(colours: dict[str, tuple[float, float, float]]) -> bytes:
    """Return a font that draws each emoji as a square of its colour; an emoji of several characters is one glyph."""
    glyph_names = {characters: "_".join(f"u{ord(c):04x}" for c in characters) for characters in colours}
    characters_alone = sorted({c for characters in colours for c in characters})
    order = [
        ".notdef",
        "square",
        *dict.fromkeys([f"u{ord(c):04x}" for c in characters_alone] + [*glyph_names.values()]),
    ]
    builder = font_builder.FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(order)
    builder.setupCharacterMap({ord(c): f"u{ord(c):04x}" for c in characters_alone})
    pen = TTGlyphPen(None)
    for number, point in enumerate([(0, 0), (0, 1000), (1000, 1000), (1000, 0)]):
        (pen.lineTo if number else pen.moveTo)(point)
    pen.closePath()
    square, empty_glyph = pen.glyph(), TTGlyphPen(None).glyph()
    drawn_names = {"square", *glyph_names.values()}
    builder.setupGlyf({name: square if name in drawn_names else empty_glyph for name in order})
    builder.setupHorizontalMetrics({name: (0 if name in ("u200d", "ufe0f") else 1000, 0) for name in order})
    builder.setupHorizontalHeader(ascent=1000, descent=0)
    builder.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    palette = [(*colour, 1.0) for colour in colours.values()]
    builder.setupCPAL([palette])
    builder.setupCOLR({glyph_names[characters]: [("square", index)] for index, characters in enumerate(colours)})
    sequences = [characters for characters in colours if len(characters) > 1]
    if sequences:
        rules = "".join(
            f"sub {' '.join(f'u{ord(c):04x}' for c in characters)} by {glyph_names[characters]};"
            for characters in sequences
        )
        addOpenTypeFeaturesFromString(builder.font, f"feature ccmp {{ {rules} }} ccmp;")
    buffer = io.BytesIO()
    builder.font.save(buffer)
    return buffer.getvalue()


def annotations_file(names: dict[str, str], keywords: str = "one | two") -> bytes:
    """Return an annotations file of CLDR with a name and keywords for each emoji."""
    lines = "".join(
        f'<annotation cp="{characters}">{keywords}</annotation>'
        f'<annotation cp="{characters}" type="tts">{name}</annotation>'
        for characters, name in names.items()
    )
    return f"<?xml version='1.0' encoding='UTF-8'?><ldml><annotations>{lines}</annotations></ldml>".encode()


def emoji_table(*emoji: str, subgroup: str = "face") -> bytes:
    """Return an `emoji-test.txt` with these emoji in one subgroup."""
    rows = (f"{' '.join(f'{ord(c):04X}' for c in characters)} ; fully-qualified # x" for characters in emoji)
    return "\n".join(["# group: Smileys", f"# subgroup: {subgroup}", *rows]).encode()


def read_shards(folder: Path) -> dict[str, dict]:
    """Return `pixels`, `caption` and `record` of each image in the shards of a folder, by the image's key."""
    files = dict[str, dict[str, bytes]]()
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                content = tar.extractfile(member)
                assert content
                key, _, suffix = member.name.partition(".")
                files.setdefault(key, {})[suffix] = content.read()
    return {
        key: {
            "pixels": np.asarray(Image.open(io.BytesIO(parts["png"]))),
            "caption": parts["txt"].decode(),
            "record": json.loads(parts["json"]),
        }
        for key, parts in files.items()
    }
