"""Composition of a scene: drawings over a crop of a background, with the mask of the visible part of each."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from mhmoe_ray.corpus.backgrounds import Background
from mhmoe_ray.corpus.scene_objects import Drawing

if TYPE_CHECKING:
    from PIL.Image import Image

_Item = TypeVar("_Item")

LARGEST_COUNT = 4
SCALES = (0.25, 0.65)
"""Range of the length of an object's longer side, as a share of the scene's side."""
ROTATIONS = (-15.0, 15.0)
"""Range of the rotation of an object in degrees."""
BRIGHTNESSES = (0.8, 1.2)
"""Range of the factor of an object's brightness."""
SMALLEST_VISIBLE_SHARE = 0.5
"""Smallest share of an object's pixels that the objects in front of it leave visible."""
SMALLEST_AREA = 16
"""Smallest number of visible pixels of an object; small drawings of thin lines nearly vanish."""
ATTEMPTS = 5
"""Number of attempts to place a random object."""
LARGEST_OUTSIDE_ALPHA = 127
"""Largest alpha, from 0 to 255, of a pixel outside of an object's mask."""
UNMIRRORED_CLASSES = frozenset({"flag"})
"""Classes of objects that are never mirrored: the mirror image of a flag may be another flag."""


@dataclass
class SceneObject:
    """An object in a scene.

    Attributes:
        mask: whether the object is visible, by pixel of the scene (bool, height x width).
        drawn_area: number of the object's pixels without occlusion.
    """

    class_name: str
    drawing: Drawing
    mask: np.ndarray
    drawn_area: int


@dataclass
class Scene:
    """An image in RGB with objects from back to front, and the name of its background."""

    image: "Image"
    background: str
    objects: list[SceneObject]


def seeded_generator(label: str) -> np.random.Generator:
    """Return a generator of random numbers whose seed is a hash of a label."""
    return np.random.default_rng(int.from_bytes(blake2b(label.encode(), digest_size=16).digest()))


class SceneComposer:
    """Composer of the random scenes of a split, from at least one background and one class of drawings.

    A class has groups of drawings that look almost the same, such as one emoji in all skin tones; all groups of a class
    are equally likely. `size` is the width and height of a scene in pixels.
    """

    def __init__(
        self, backgrounds: Sequence[Background], drawings: Mapping[str, Sequence[Sequence[Drawing]]], size: int
    ) -> None:
        self._backgrounds, self._size = backgrounds, size
        self._groups = sorted(drawings.items())

    def compose(self, generator: np.random.Generator) -> Scene:
        """Return a random scene, which the generator's state determines."""
        background = _choose(self._backgrounds, generator)
        scene = Scene(background.crop(self._size, generator), background.name, [])
        for _ in range(generator.integers(1, LARGEST_COUNT + 1)):
            for _ in range(ATTEMPTS):
                if self._add_object(scene, generator):
                    break
        return scene

    def _add_object(self, scene: Scene, generator: np.random.Generator) -> bool:
        """Put a random object in front of a scene; return False if it is too small or hides too much."""
        class_name, groups = _choose(self._groups, generator)
        drawing = _choose(_choose(groups, generator), generator)
        drawn_image = self._draw_object(class_name, drawing, generator)
        x, y = (int(generator.integers(self._size - length + 1)) for length in drawn_image.size)
        mask = np.zeros((self._size, self._size), bool)
        alpha = drawn_image.getchannel("A")
        mask[y : y + drawn_image.height, x : x + drawn_image.width] = np.asarray(alpha) > LARGEST_OUTSIDE_ALPHA
        area = int(mask.sum())
        if area < SMALLEST_AREA:
            return False
        remaining_masks = [placed.mask & ~mask for placed in scene.objects]
        for placed, remaining_mask in zip(scene.objects, remaining_masks, strict=True):
            if remaining_mask.sum() < max(SMALLEST_AREA, SMALLEST_VISIBLE_SHARE * placed.drawn_area):
                return False
        for placed, remaining_mask in zip(scene.objects, remaining_masks, strict=True):
            placed.mask = remaining_mask
        scene.image.paste(drawn_image, (x, y), alpha)
        scene.objects.append(SceneObject(class_name, drawing, mask, area))
        return True

    def _draw_object(self, class_name: str, drawing: Drawing, generator: np.random.Generator) -> "Image":
        from PIL import Image, ImageEnhance, ImageOps

        side = self._size * generator.uniform(*SCALES)
        is_mirrored = generator.random() < 0.5
        degrees, brightness = generator.uniform(*ROTATIONS), generator.uniform(*BRIGHTNESSES)
        image: Image.Image = Image.open(io.BytesIO(drawing.png))
        if is_mirrored and class_name not in UNMIRRORED_CLASSES:
            image = ImageOps.mirror(image)
        image = image.rotate(degrees, Image.Resampling.BICUBIC, expand=True)
        image = image.crop(image.getchannel("A").getbbox())
        scale = side / max(image.size)
        width, height = (max(1, round(length * scale)) for length in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
        return ImageEnhance.Brightness(image).enhance(brightness)


def _choose(items: Sequence[_Item], generator: np.random.Generator) -> _Item:
    return items[int(generator.integers(len(items)))]
