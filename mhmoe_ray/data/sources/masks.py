"""Check of the masks of objects in COCO's JSON, and their encoding as compressed run lengths.

A mask is a list of polygons, or it is run lengths: a list of numbers or COCO's compressed string. They go through the
pixels column by column: a run of pixels outside of the object, then one inside, and so on.

pycocotools is C code that trusts its input: wrong run lengths make it write outside of its memory. Masks are checked
first.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mhmoe_ray.data.sources.records import json_type

MAX_PIXELS = (1 << 31) - 1
"""Pixel limit of pycocotools, which numbers pixels with signed 32-bit integers."""
MAX_POLYGONS = 10_000
"""Polygon limit of a mask: joining so many takes about a second."""
MASKS_PER_MERGE = 64
MAX_OUTLINE = 1_000_000
"""Limit in pixels of the total length of a mask's outlines; pycocotools needs some 100 bytes per pixel."""

_FIRST_CHARACTER = ord("0")
_MAX_SHIFT = 40


class ObjectError(Exception):
    """Error for an annotated object that cannot be used; its message is the reason."""


def is_number(value: object) -> bool:
    """Return whether a JSON value is a number; true and false are not."""
    return type(value) in (int, float)


def encode_mask(segmentation: object, width: int, height: int) -> str:
    """Return an object's mask, which has the size of its image, as COCO's compressed run lengths.

    A JSON value that is no mask of this size, or a mask without a pixel, is an ObjectError.
    """
    from pycocotools import mask as coco_masks

    if width * height > MAX_PIXELS:
        raise ObjectError("its image has too many pixels for a mask")
    mask: dict[str, Any]
    if isinstance(segmentation, list):
        polygons = _checked_polygons(segmentation, width, height)
        polygon_masks = coco_masks.frPyObjects(polygons, height, width)
        # The masks are joined in small groups, because joining all at once would take time that grows with the square
        # of their number.
        while len(polygon_masks) > 1:
            groups = range(0, len(polygon_masks), MASKS_PER_MERGE)
            polygon_masks = [coco_masks.merge(polygon_masks[start : start + MASKS_PER_MERGE]) for start in groups]
        [mask] = polygon_masks
    elif isinstance(segmentation, dict):
        run_lengths = _checked_run_lengths(segmentation, width, height)
        uncompressed_mask = {"size": [height, width], "counts": _join_runs(run_lengths)}
        mask = coco_masks.frPyObjects(uncompressed_mask, height, width)
    else:
        raise ObjectError(f"its segmentation is {json_type(segmentation)}")
    if not coco_masks.area(mask):
        raise ObjectError("its mask has no pixel")
    counts: str = mask["counts"].decode()
    return counts


def _checked_polygons(segmentation: list[Any], width: int, height: int) -> list[np.ndarray]:
    """Return x and y of each polygon in turn; polygons that are too costly to draw are an ObjectError."""
    if not 0 < len(segmentation) <= MAX_POLYGONS:
        raise ObjectError(f"its segmentation has {len(segmentation):,} polygons")
    polygons, outline, limits = list[np.ndarray](), 0.0, np.array([width, height], np.float64)
    for polygon in segmentation:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2 or not all(map(is_number, polygon)):
            raise ObjectError("a polygon of its segmentation is no list of three or more x and y")
        points = np.array(polygon, np.float64).reshape(-1, 2)
        # The comparison is also false for infinity and NaN.
        if not ((points >= -limits) & (points <= 2 * limits)).all():
            raise ObjectError("a polygon of its segmentation reaches far outside of the image")
        outline += float(np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum()) + len(points)
        if outline > MAX_OUTLINE:
            raise ObjectError(f"the outline of its segmentation is longer than {MAX_OUTLINE:,} pixels")
        polygons.append(points.reshape(-1))
    return polygons


def _checked_run_lengths(segmentation: dict[str, Any], width: int, height: int) -> list[int]:
    size, counts, pixels = segmentation.get("size"), segmentation.get("counts"), width * height
    if not isinstance(size, list) or len(size) != 2 or not all(map(is_number, size)):
        raise ObjectError("its segmentation has no size of two numbers")
    if size != [height, width]:
        raise ObjectError(f"the size of its segmentation, {size}, is not that of the image, {[height, width]}")
    if isinstance(counts, str):
        counts = decode_run_lengths(counts, pixels)
    elif not isinstance(counts, list) or not all(type(count) is int and 0 <= count <= pixels for count in counts):
        raise ObjectError("the counts of its segmentation are no run lengths")
    if (total := sum(counts)) != pixels:
        raise ObjectError(f"the counts of its segmentation have {total:,} pixels, and its size has {pixels:,}")
    return counts


def decode_run_lengths(text: str, pixels: int) -> list[int]:
    """Return the run lengths in COCO's compressed string; one that is malformed is an ObjectError.

    A character holds 5 bits of a number, lowest bits first, and a sixth bit that is set if the next character continues
    it. From the fourth number on, the string has the difference to the run length two places before.
    """
    counts, value, shift = list[int](), 0, 0
    for character in text:
        digit = ord(character) - _FIRST_CHARACTER
        if not 0 <= digit < 64 or shift > _MAX_SHIFT:
            raise ObjectError("the counts of its segmentation are no run lengths")
        value |= (digit & 31) << shift
        shift += 5
        if digit & 32:
            continue
        if digit & 16:
            value -= 1 << shift
        if len(counts) > 2:
            value += counts[-2]
        if not 0 <= value <= pixels:
            raise ObjectError("the counts of its segmentation are no run lengths")
        counts.append(value)
        value, shift = 0, 0
    if shift:
        raise ObjectError("the counts of its segmentation are cut off")
    return counts


def _join_runs(counts: Sequence[int]) -> list[int]:
    """Remove runs of zero pixels except the first, and join their neighbours.

    Otherwise a mask may have more runs than pixels, for which pycocotools does not allocate enough memory.
    """
    lengths, values = np.array(counts, np.int64), np.arange(len(counts)) % 2
    values, lengths = values[lengths > 0], lengths[lengths > 0]
    starts = np.flatnonzero(np.diff(values, prepend=-1))
    joined_lengths: list[int] = np.add.reduceat(lengths, starts).tolist()
    return [0, *joined_lengths] if values[0] else joined_lengths
