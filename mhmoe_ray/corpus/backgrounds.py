"""Backgrounds of composed scenes: photographs and paintings from packages of Debian.

The patterns of the packages leave out images that show an object of the scenes' classes, because that object would
have no annotation. They also leave out images of flat shapes.
"""

import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mhmoe_ray.corpus.packages import SourcePackage
from mhmoe_ray.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

LONGEST_SIDE = 1024
"""Longest side in pixels of a background in memory; scenes show crops of it."""
_WALLPAPERS = (
    "Altai|BytheWater|ColdRipple|ColorfulCups|DarkestHour|FallenLeaf|Grey|Kite|Mountain|OneStandsOut|Path|ScarletTree"
    "|Volna|summer_1am"
)
_BUDGIE_IMAGES = (
    "abstract-spiral|beacon-street-sunset|blue-periwinkle|casa-mila|high-trestle-trail|lake-sherburne|ocean-waves"
    "|piazza-gae-aulenti|roman-colosseum|singaporean-cityscape|tea-gardens"
)

BACKGROUND_PACKAGES = (
    SourcePackage(
        "Debian",
        "plasma-workspace-wallpapers",
        "GPL-2.0-or-later",
        # The pattern leaves out other files of the same images: smaller sizes, portrait formats and dark variants.
        re.compile(rf"usr/share/wallpapers/({_WALLPAPERS})/contents/images/(2560x1600|5120x2880)\.(jpg|png)"),
    ),
    SourcePackage(
        "Debian",
        "budgie-backgrounds",
        "CC0-1.0",
        re.compile(rf"usr/share/backgrounds/budgie/({_BUDGIE_IMAGES})\.jpg"),
    ),
    SourcePackage(
        "Debian",
        "mate-backgrounds",
        "GPL-2.0-or-later",
        re.compile(r"usr/share/backgrounds/mate/nature/(?!LadyBird)(\w+)\.jpg"),
    ),
)


@dataclass(frozen=True)
class Background:
    """A photograph or painting in RGB whose crops are backgrounds of scenes."""

    name: str
    image: "Image"

    def crop(self, size: int, generator: np.random.Generator) -> "Image":
        """Return a random square crop, scaled to `size` pixels and mirrored in half of all cases."""
        from PIL import Image, ImageOps

        shortest_side = min(self.image.size)
        side = generator.uniform(min(size, shortest_side), shortest_side)
        x, y = (generator.uniform(0, length - side) for length in self.image.size)
        square = self.image.resize((size, size), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side))
        return ImageOps.mirror(square) if generator.random() < 0.5 else square


def read_backgrounds(package: SourcePackage, files: Mapping[str, bytes]) -> Iterator[Background]:
    """Yield the backgrounds of a package, sorted by path; DataError for an unreadable image.

    The first group of the package's pattern is the name of an image.
    """
    from PIL import Image

    for path, content in sorted(files.items()):
        match = package.files.fullmatch(path)
        assert match
        try:
            image = Image.open(io.BytesIO(content))
            # `thumbnail` comes before the conversion to RGB, so that it can decode a JPEG file directly at a fraction
            # of its size.
            image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
            yield Background(match[1], image.convert("RGB"))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
            raise DataError(
                f"package {package.name}", f"{path} is no readable image ({e})", "delete the package from the cache"
            ) from e
