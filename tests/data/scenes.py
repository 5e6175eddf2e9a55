"""Small data sets of images with classes and with objects for tests, written as other tools write them."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (40, 60, 220)}
"""Names of the classes, and their colours."""


def write_class_folders(folder: Path, count: int, size: int = 20) -> None:
    """Write images in ImageNet's layout, a folder for each class: squares of its colour on grey."""
    rng = np.random.default_rng(1)
    for number in range(count):
        name = [*COLOURS][number % len(COLOURS)]
        pixels, _ = _image(rng, name, size, size)
        path = folder / name / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


def write_coco_folder(folder: Path, count: int, width: int = 40, height: int = 32) -> None:
    """Write images with objects in COCO's layout: `annotations/instances_train.json`, and the folder `train`.

    The masks are polygons, as in COCO.
    """
    rng = np.random.default_rng(2)
    tree = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 7 + n, "name": name} for n, name in enumerate(COLOURS)],
    }
    (folder / "train").mkdir(parents=True)
    (folder / "annotations").mkdir()
    for number in range(count):
        name = [*COLOURS][number % len(COLOURS)]
        pixels, (x, y, w, h) = _image(rng, name, width, height)
        Image.fromarray(pixels).save(folder / "train" / f"{number:04d}.png")
        image = {"id": 100 + number, "file_name": f"{number:04d}.png", "width": width, "height": height}
        tree["images"].append(image)
        tree["annotations"].append(
            {
                "id": number + 1,
                "image_id": image["id"],
                "category_id": 7 + [*COLOURS].index(name),
                "bbox": [x, y, w, h],
                "area": w * h,
                "iscrowd": 0,
                "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
            }
        )
    (folder / "annotations" / "instances_train.json").write_text(json.dumps(tree))


def _image(rng: np.random.Generator, name: str, width: int, height: int) -> tuple[np.ndarray, tuple[int, ...]]:
    """Return an image with a rectangle of a class's colour, and the rectangle's left, top, width and height."""
    pixels = rng.integers(110, 146, (height, width, 3), np.uint8)
    w, h = (int(side) for side in rng.integers(9, 15, 2))
    x, y = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
    pixels[y : y + h, x : x + w] = COLOURS[name]
    return pixels, (x, y, w, h)
