"""Tests of the composition of scenes, and of the classes and the split of their objects."""

import io

import numpy as np
import pytest

pytest.importorskip("PIL")

from PIL import Image, ImageDraw

from mhmoe_ray.corpus.backgrounds import Background
from mhmoe_ray.corpus.captions import stamp_concept
from mhmoe_ray.corpus.compose import (
    LARGEST_COUNT,
    SMALLEST_VISIBLE_SHARE,
    SceneComposer,
    seeded_generator,
)
from mhmoe_ray.corpus.scene_objects import Drawing, likeness_key, object_class, split_of

SIZE = 64


def disc_drawing(colour: str, key: str = "disc") -> Drawing:
    image = Image.new("RGBA", (96, 96))
    ImageDraw.Draw(image).ellipse((10, 20, 80, 70), fill=colour)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return Drawing(key, "artist", buffer.getvalue())


def compose_scenes(drawings: dict[str, list[list[Drawing]]], count: int):
    composer = SceneComposer([Background("black", Image.new("RGB", (100, 80)))], drawings, SIZE)
    return [composer.compose(seeded_generator(f"scene {number}")) for number in range(count)]


def test_masks_are_the_pixels_of_objects():
    for scene in compose_scenes({"red": [[disc_drawing("red")]], "blue": [[disc_drawing("blue")]]}, 20):
        pixels = np.asarray(scene.image)
        assert pixels.shape == (SIZE, SIZE, 3)
        union = np.zeros((SIZE, SIZE), bool)
        for placed in scene.objects:
            assert not (union & placed.mask).any()
            union |= placed.mask
            channel, other_channel = (0, 2) if placed.class_name == "red" else (2, 0)
            # Brightness 0.8, alpha 1/2 at the edge and the edge of a later object over it leave 255 x 0.8 x 1/4 = 51.
            assert pixels[placed.mask, channel].min() > 45
            assert np.median(pixels[placed.mask, channel]) > 200
            assert np.median(pixels[placed.mask, other_channel]) < 5
        assert np.percentile(pixels[~union], 99) < 130


def test_objects_stay_visible():
    scenes = compose_scenes({"red": [[disc_drawing("red")]]}, 60)
    counts = [len(scene.objects) for scene in scenes]
    assert (min(counts), max(counts)) == (1, LARGEST_COUNT)
    shares = [placed.mask.sum() / placed.drawn_area for scene in scenes for placed in scene.objects]
    assert min(shares) >= SMALLEST_VISIBLE_SHARE
    assert min(shares) < 0.8
    assert all(scene.objects[-1].mask.sum() == scene.objects[-1].drawn_area for scene in scenes)


def test_groups_of_a_class_are_equally_likely():
    many_versions = [disc_drawing("red", "many") for _ in range(50)]
    scenes = compose_scenes({"red": [many_versions, [disc_drawing("blue", "single")]]}, 150)
    keys = [placed.drawing.key for scene in scenes for placed in scene.objects]
    assert 0.4 < keys.count("single") / len(keys) < 0.6


def test_flags_are_not_mirrored():
    image = Image.new("RGBA", (96, 96), "blue")
    ImageDraw.Draw(image).rectangle((0, 0, 47, 95), fill="red")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    drawing = Drawing("flag", "artist", buffer.getvalue())

    def count_mirrored(class_name: str) -> int:
        mirrored_count = 0
        for scene in compose_scenes({class_name: [[drawing]]}, 30):
            pixels, placed = np.asarray(scene.image), scene.objects[-1]
            rows, columns = placed.mask.nonzero()
            red, blue = pixels[rows, columns, 0] > 127, pixels[rows, columns, 2] > 127
            mirrored_count += bool(columns[red].mean() > columns[blue].mean())
        return mirrored_count

    assert count_mirrored("flag") == 0
    assert 5 < count_mirrored("animal") < 25


def test_an_invisible_object_is_left_out():
    scenes = compose_scenes({"glass": [[disc_drawing("#ff00003c")]]}, 3)
    assert not any(scene.objects for scene in scenes)


def test_a_crop_is_a_square_of_the_background():
    gradient = np.zeros((200, 300, 3), np.uint8)
    gradient[..., 0] = np.arange(200)[:, None]
    background = Background("gradient", Image.fromarray(gradient))
    crops = [np.asarray(background.crop(50, seeded_generator(str(number)))) for number in range(30)]
    assert {crop.shape for crop in crops} == {(50, 50, 3)}
    ranges = [int(np.ptp(crop[..., 0])) for crop in crops]
    assert min(ranges) >= 48
    assert max(ranges) > 150


@pytest.mark.parametrize(
    ("path", "name", "expected"),
    [
        ("animals/birds/crow", "A crow.", "animal"),
        ("vehicles/auto/beetle", "A VW Beetle.", "vehicle"),
        ("vehicles/cycle/tire", "A tire.", None),
        ("food/fruit/apple", "A red apple.", "food"),
        ("symbols/alphabets/asl/a", "The sign for A.", None),
        ("town/flags/green", "A green flag.", "flag"),
    ],
)
def test_classes_of_stamps(path, name, expected):
    concept = stamp_concept(path, [name])
    assert concept
    assert object_class(concept) == expected


def test_variants_of_an_emoji_share_a_likeness_key():
    astronauts = ["1f468-200d-1f680", "1f469-1f3fb-200d-1f680", "1f9d1-200d-1f680"]
    assert {likeness_key(key) for key in astronauts} == {"1f9d1-200d-1f680"}
    walkers = ["1f6b6", "1f6b6-200d-27a1", "1f6b6-1f3fd-200d-2640-200d-27a1"]
    assert {likeness_key(key) for key in walkers} == {"1f6b6"}


def test_split_has_its_shares():
    splits = [split_of(f"name {number}") for number in range(4000)]
    assert 0.08 < splits.count("validation") / 4000 < 0.12
    assert 0.13 < splits.count("test") / 4000 < 0.17
