"""Rendering of drawings from fonts, SVG and bitmap files into square PNG files with alpha (extra `picture-sample`)."""

import io
from typing import TYPE_CHECKING, Literal

import numpy as np

from mhmoe_ray.corpus.captions import VARIATION_SELECTOR
from mhmoe_ray.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

EMOJI_FONT_SIZE = 109
"""Size in pixels of the only bitmaps that Noto Color Emoji has."""
REFERENCE_CHARACTER = "\U0001f600"
"""Character whose glyph is measured; all glyphs of an emoji font have the same size."""
SVG_DPI = 96
"""Pixels per inch of SVG (CSS 2.1), for drawings whose size is in millimetres."""


class LeftOutError(Exception):
    """Error for a drawing that cannot be rendered or used; drawings are counted by its text, the reason."""


def check_libraries(extra: Literal["picture-sample", "scene-sample"] = "picture-sample") -> None:
    """Check that Pillow, resvg-py and, for scenes, pycocotools are installed; DataError if not."""
    try:
        import PIL.ImageFont  # noqa: F401
        import resvg_py  # noqa: F401

        if extra == "scene-sample":
            import pycocotools.mask  # noqa: F401
    except ImportError as e:
        module = (e.name or "").partition(".")[0]
        package = {"resvg_py": "resvg-py", "pycocotools": "pycocotools"}.get(module, "pillow")
        raise DataError(
            extra.replace("-", " "), f"the package {package} is missing", f"pip install 'mhmoe-ray[{extra}]'"
        ) from e


class EmojiFont:
    """A font whose glyphs are colour bitmaps, one for each emoji; DataError if Pillow cannot read it."""

    def __init__(self, content: bytes) -> None:
        from PIL import ImageFont, features

        # Only raqm joins several characters to one glyph. Without it, emoji of a single character can be drawn.
        self._has_layout = features.check("raqm")
        layout = ImageFont.Layout.RAQM if self._has_layout else ImageFont.Layout.BASIC
        try:
            self._font = ImageFont.truetype(io.BytesIO(content), EMOJI_FONT_SIZE, layout_engine=layout)
        except OSError as e:
            raise DataError("font of emoji", f"it cannot be read ({e})", "delete its package from the cache") from e
        x_min, _, x_max, _ = self._font.getbbox(REFERENCE_CHARACTER)
        self._glyph_width = x_max - x_min

    def draw(self, characters: str) -> "Image":
        """Return the drawing of an emoji, with alpha; LeftOutError if the font has no single glyph for it."""
        from PIL import Image, ImageDraw

        if not self._has_layout:
            characters = characters.replace(VARIATION_SELECTOR, "")
            if len(characters) > 1:
                raise LeftOutError("sequence needs a Pillow with raqm")
        x_min, y_min, x_max, y_max = self._font.getbbox(characters)
        if x_max <= x_min or y_max <= y_min:
            raise LeftOutError("no glyph")
        # Characters that the font cannot join are drawn as several glyphs. All its glyphs have the same width, apart
        # from rounding, so a wider drawing has several.
        if x_max - x_min > self._glyph_width + 1:
            raise LeftOutError("no glyph for the whole sequence")
        size = (round(x_max - x_min), round(y_max - y_min))
        # Pillow blends the drawing with the image that it draws on. On this black image, it multiplies each colour by
        # alpha, so a division by alpha restores the colours.
        image = Image.new("RGBA", size)
        ImageDraw.Draw(image).text((-x_min, -y_min), characters, font=self._font, embedded_color=True)
        pixels = np.asarray(image).astype(np.uint32)
        alpha = pixels[..., 3:]
        pixels[..., :3] = np.minimum(255, (pixels[..., :3] * 255 + alpha // 2) // np.maximum(alpha, 1))
        return Image.fromarray(pixels.astype(np.uint8))


def render_svg(content: bytes, width: int) -> "Image":
    """Return an SVG drawing with alpha, `width` pixels wide in its own proportions; LeftOutError if resvg fails."""
    import resvg_py
    from PIL import Image

    # System fonts are skipped, because the result would otherwise depend on the machine.
    try:
        png = resvg_py.svg_to_bytes(
            svg_string=content.decode("utf-8"), width=width, dpi=SVG_DPI, skip_system_fonts=True
        )
    except ValueError as e:
        raise LeftOutError("unreadable SVG") from e
    return Image.open(io.BytesIO(bytes(png)))


def read_bitmap(content: bytes) -> "Image":
    """Return the image in a PNG file, with alpha; LeftOutError if Pillow cannot read it."""
    from PIL import Image

    try:
        return Image.open(io.BytesIO(content)).convert("RGBA")
    # Pillow raises these errors for damaged files, and the last one for images with so many pixels that they may be
    # an attack.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise LeftOutError("unreadable PNG") from e


def square_png(image: "Image", size: int) -> bytes:
    """Return a PNG file of a square of `size` pixels with a scaled image in its middle, on transparent ground.

    An image without a visible pixel is an LeftOutError.
    """
    from PIL import Image

    image = image.convert("RGBA")
    if image.getchannel("A").getbbox() is None:
        raise LeftOutError("empty drawing")
    scale = size / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    scaled = image.resize((width, height), Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (size, size))
    square.paste(scaled, ((size - width) // 2, (size - height) // 2))
    buffer = io.BytesIO()
    square.save(buffer, "PNG")
    return buffer.getvalue()
