"""Annotated objects with masks, and the names of their classes."""

import numpy as np

from mhmoe_ray.data.images.annotations import Instance

NAMES = ["circle", "ring", "square"]


def encoded_mask(mask):
    from pycocotools import mask as coco_masks

    return coco_masks.encode(np.asfortranarray(mask, np.uint8))["counts"].decode()


def instance(mask, name="square", **fields):
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    return Instance(name, tuple(map(float, box)), encoded_mask(mask), **fields)


def square_mask(height, width, top_edge, left_edge, side):
    mask = np.zeros((height, width), bool)
    mask[top_edge : top_edge + side, left_edge : left_edge + side] = True
    return mask
