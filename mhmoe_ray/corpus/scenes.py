"""The scene sample: composed scenes with objects and their masks, and folders of drawings by class.

    DIR/scenes/SPLIT/annotations/instances_SPLIT.json   objects in COCO's format: boxes, classes and masks
    DIR/scenes/SPLIT/SPLIT/NNNNNN.jpg                   the scenes
    DIR/classes/SPLIT/CLASS/ARTIST-KEY.png              drawings of emoji on white, by their subgroup
    DIR/licenses                                        the licence text that each package contains

SPLIT is train, validation or test. The concepts and the backgrounds of validation and test are not in the training.
Every artist is in every split.
"""

import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from mhmoe_ray.corpus.artists import ARTISTS, Artist
from mhmoe_ray.corpus.backgrounds import BACKGROUND_PACKAGES, Background, read_backgrounds
from mhmoe_ray.corpus.captions import Concept
from mhmoe_ray.corpus.compose import SceneComposer, SceneObject, seeded_generator
from mhmoe_ray.corpus.drawings import LeftOutError, check_libraries
from mhmoe_ray.corpus.packages import SourcePackage
from mhmoe_ray.corpus.sample import SPLITS, DrawingSample, DrawingSummary
from mhmoe_ray.corpus.scene_objects import OBJECT_CLASSES, Drawing, likeness_key, object_class, split_of
from mhmoe_ray.corpus.shards import remove_files
from mhmoe_ray.errors import DataError

SCENE_SIZE = 128
"""Width and height of a scene in pixels."""
SCENE_COUNTS = {"train": 4000, "validation": 300, "test": 500}
"""Number of scenes by split."""
JPEG_QUALITY = 92
_CATEGORY_IDS = {name: number for number, name in enumerate(OBJECT_CLASSES, start=1)}


@dataclass
class SceneSummary(DrawingSummary):
    """Summary of a scene sample on disk.

    Attributes:
        objects: number of objects by split and class.
        drawings: number of drawings that scenes of a split can contain, by split.
        pictures: number of images in the folders of classes, by split.
        classes: number of folders of classes by split.
    """

    scenes: dict[str, int] = field(default_factory=dict)
    objects: dict[str, dict[str, int]] = field(default_factory=dict)
    drawings: dict[str, int] = field(default_factory=dict)
    backgrounds: dict[str, int] = field(default_factory=dict)
    pictures: dict[str, int] = field(default_factory=dict)
    classes: dict[str, int] = field(default_factory=dict)

    def describe_shortfall(self) -> str | None:
        """Return a clause for the user about what the sample lacks; None if it is complete."""
        if missing_splits := [split for split in SPLITS if not self.scenes.get(split)]:
            return f"it has no scenes for {', '.join(missing_splits)}"
        package_count = len(self.missing_packages)
        return f"{package_count} of its packages are missing" if package_count else None


def write_scene_sample(
    folder: Path,
    cache: Path,
    print_line: Callable[[str], None],
    scene_seed: int = 0,
    size: int = SCENE_SIZE,
    counts: Mapping[str, int] = SCENE_COUNTS,
    artists: Iterable[Artist] = ARTISTS,
    background_packages: Iterable[SourcePackage] = BACKGROUND_PACKAGES,
) -> SceneSummary:
    """Write the scene sample below `folder`, in place of an earlier one, and return its summary.

    A package that cannot be downloaded or read is left out with a printed warning. The same packages and seed give the
    same files, byte for byte. Another `scene_seed` arranges the same objects and backgrounds in other scenes, and their
    split into training, validation and test stays the same. `size` is the width and height of a scene in pixels.
    Missing Pillow, resvg-py or pycocotools, or a folder that cannot be written, is a DataError.
    """
    check_libraries("scene-sample")
    sample = _SceneSample(folder, cache, print_line)
    try:
        _remove_scenes(folder)
        sample.add_artists(artists)
        for package in background_packages:
            sample.attempt(partial(sample.add_backgrounds, package))
        for split, count in counts.items():
            sample.write_scenes(split, count, scene_seed, size)
    except OSError as e:
        raise DataError(f"data sample {folder}", e.strerror or str(e), "name folders you can write") from e
    return sample.summary


class _SceneSample(DrawingSample):
    """A scene sample that is being written, with the drawings and backgrounds read so far."""

    def __init__(self, folder: Path, cache: Path, print_line: Callable[[str], None]) -> None:
        super().__init__(folder, cache, print_line)
        self.summary: SceneSummary = SceneSummary()
        self._split_by_drawing = dict[bytes, str]()
        # Drawings by split, by class of objects, and by `likeness_key`, which is the same for concepts that look almost
        # alike.
        self._drawings: dict[str, dict[str, dict[str, list[Drawing]]]] = {split: {} for split in SPLITS}
        self._backgrounds: dict[str, list[Background]] = {split: [] for split in SPLITS}

    @cached_property
    def _training_classes(self) -> set[str]:
        return {c.class_name for c in self.concepts.values() if split_of(likeness_key(c.key)) == "train"}

    def add_drawing(self, artist: Artist, concept: Concept, png: bytes) -> None:
        """Write a drawing into the folder of its class, and keep it if scenes can contain it."""
        group_key = likeness_key(concept.key)
        split = split_of(group_key)
        # Some concepts share a drawing, such as the flags of Norway and Svalbard. A drawing must not be in two splits.
        if self._split_by_drawing.setdefault(blake2b(png).digest(), split) != split:
            raise LeftOutError("same as a drawing of another split")
        class_name = object_class(concept)
        if class_name:
            groups = self._drawings[split].setdefault(class_name, {})
            groups.setdefault(group_key, []).append(Drawing(concept.key, artist.name, png))
            self.summary.drawings[split] = self.summary.drawings.get(split, 0) + 1
        # The classes of the images in folders are the subgroups of emoji. Tux Paint's stamps have folders in place of
        # subgroups, so they are left out here.
        if artist.draws_emoji and concept.class_name in self._training_classes:
            self._write_image(split, concept, artist, png)
        elif not class_name:
            raise LeftOutError("of no class")

    def _write_image(self, split: str, concept: Concept, artist: Artist, png: bytes) -> None:
        from PIL import Image

        drawing = Image.open(io.BytesIO(png))
        image = Image.new("RGB", drawing.size, "white")
        image.paste(drawing, mask=drawing)
        class_folder = self.folder / "classes" / split / concept.class_name
        if not class_folder.exists():
            class_folder.mkdir(parents=True)
            self.summary.classes[split] = self.summary.classes.get(split, 0) + 1
        image.save(class_folder / f"{artist.name}-{concept.key}.png")
        self.summary.pictures[split] = self.summary.pictures.get(split, 0) + 1

    def add_backgrounds(self, package: SourcePackage) -> None:
        """Assign each background of a package to a split; DataError for an unusable package or image."""
        backgrounds = list(read_backgrounds(package, self.read_files(package)))
        for background in backgrounds:
            split = split_of(background.name)
            self._backgrounds[split].append(background)
            self.summary.backgrounds[split] = self.summary.backgrounds.get(split, 0) + 1
        self.print_line(f"{package.name}: {len(backgrounds):,} backgrounds")

    def write_scenes(self, split: str, count: int, scene_seed: int, size: int) -> None:
        """Write the scenes of a split with their annotations, if it has drawings and backgrounds."""
        drawings, backgrounds = self._drawings[split], self._backgrounds[split]
        if not drawings or not backgrounds:
            return
        # The order of the packages must not change the scenes, so the backgrounds are sorted.
        backgrounds.sort(key=lambda background: background.name)
        sorted_groups = {name: [groups[key] for key in sorted(groups)] for name, groups in drawings.items()}
        composer = SceneComposer(backgrounds, sorted_groups, size)
        image_folder = self.folder / "scenes" / split / split
        image_folder.mkdir(parents=True, exist_ok=True)
        images, annotations = list[dict[str, Any]](), list[dict[str, Any]]()
        object_counts = Counter(dict.fromkeys(OBJECT_CLASSES, 0))
        # COCO's evaluation understands id 0 as no object, so ids begin with 1.
        for image_id in range(1, count + 1):
            scene = composer.compose(seeded_generator(f"{split} {scene_seed} {image_id}"))
            name = f"{image_id:06d}.jpg"
            scene.image.save(image_folder / name, quality=JPEG_QUALITY)
            image = {"id": image_id, "file_name": name, "width": size, "height": size}
            images.append({**image, "background": scene.background})
            for scene_object in scene.objects:
                annotations.append(_annotation(len(annotations) + 1, image_id, scene_object))
                object_counts[scene_object.class_name] += 1
        categories = [{"id": number, "name": name} for name, number in _CATEGORY_IDS.items()]
        path = self.folder / "scenes" / split / "annotations" / f"instances_{split}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
        self.summary.scenes[split], self.summary.objects[split] = count, dict(object_counts)
        self.print_line(f"{split}: {count:,} scenes with {len(annotations):,} objects")


def _annotation(annotation_id: int, image_id: int, scene_object: SceneObject) -> dict[str, Any]:
    """Return an object's annotation in COCO's format, with its concept and its artist as additional keys."""
    from pycocotools import mask as coco_masks

    rows, columns = (np.flatnonzero(scene_object.mask.any(axis=axis)) for axis in (1, 0))
    x, y = int(columns[0]), int(rows[0])
    run_lengths = coco_masks.encode(np.asfortranarray(scene_object.mask, np.uint8))
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": _CATEGORY_IDS[scene_object.class_name],
        "bbox": [x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1],
        "area": int(scene_object.mask.sum()),
        "segmentation": {"size": list(scene_object.mask.shape), "counts": run_lengths["counts"].decode()},
        "iscrowd": 0,
        "concept": scene_object.drawing.key,
        "artist": scene_object.drawing.artist,
    }


def _remove_scenes(folder: Path) -> None:
    artist_names = "|".join(artist.name for artist in ARTISTS)
    for split in SPLITS:
        scene_folder = folder / "scenes" / split
        # The annotations are removed first, so that a sample whose removal was interrupted is not mistaken for a
        # complete one.
        (scene_folder / "annotations" / f"instances_{split}.json").unlink(missing_ok=True)
        remove_files(scene_folder / split, r"\d{6}\.jpg")
        for class_folder in folder.glob(f"classes/{split}/*/"):
            remove_files(class_folder, rf"({artist_names})-.*\.png")
