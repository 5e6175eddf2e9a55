"""Tests of the reader of images with objects in COCO's JSON, whose masks pycocotools wrote."""

import io
import json
import sys

import hypothesis
import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_masks

from mhmoe_ray.data.images import annotations as annotations_module
from mhmoe_ray.data.images.annotations import Instance, decode_mask, unpack
from mhmoe_ray.data.sources import Reason, masks
from mhmoe_ray.data.sources.items import BadLine, Document
from mhmoe_ray.data.sources.masks import ObjectError, decode_run_lengths, encode_mask
from mhmoe_ray.errors import DataError
from tests.data.sources.read import read_source
from tests.support.images import encode_image

EXAMPLES = 5000 if hypothesis.settings.get_current_profile_name() == "explore" else 200
WIDTH, HEIGHT = 30, 20
CATEGORIES = [{"id": 3, "name": "boat"}, {"id": "x", "name": "moon"}]
BOX = {"id": 1, "image_id": 1, "category_id": 3, "bbox": [2, 3, 10, 8]}
SQUARE = [4, 4, 12, 4, 12, 10, 4, 10]


def write_objects(folder, annotations, images=None, **keys):
    """Write two images and a JSON file of annotated objects beside them; return the path of the JSON file."""
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(3)
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(encode_image(random.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)))
    images = images or [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}]
    path = folder / "instances.json"
    path.write_bytes(orjson.dumps({"images": images, "annotations": annotations, "categories": CATEGORIES, **keys}))
    return path


def read_objects(path):
    """Return the images of a JSON file by their ids, and the items that could not be read."""
    items, _ = read_source(path, format="coco", columns=["image", "objects"])
    documents = [item for item in items if isinstance(item, Document)]
    assert all(item.text == "" and item.image and item.image_hash for item in documents)
    notes = [unpack(item.annotation) for item in documents]
    return {note.image_id: note.instances for note in notes}, [item for item in items if isinstance(item, BadLine)]


def random_mask(seed=0):
    """Return a mask of some blobs, (HEIGHT, WIDTH) uint8."""
    pixels = np.random.default_rng(seed).random((HEIGHT // 4, WIDTH // 5)) < 0.4
    return np.kron(pixels, np.ones((4, 5))).astype(np.uint8)


def uncompressed_counts(mask):
    """Return the run lengths of a mask, of which the first is a run of pixels outside of it."""
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    lengths = np.diff([0, *edges, flat.size]).tolist()
    return [0, *lengths] if flat[0] else lengths


def test_objects_have_boxes_classes_and_masks(tmp_path):
    pixels = random_mask()
    compressed = coco_masks.encode(np.asfortranarray(pixels))["counts"].decode()
    polygons = [SQUARE, [20.5, 1.5, 28, 2, 25, 9.25]]
    segmentations = [
        polygons,
        {"size": [HEIGHT, WIDTH], "counts": compressed},
        {"size": [HEIGHT, WIDTH], "counts": uncompressed_counts(pixels)},
        None,
        [],
    ]
    entries = [{**BOX, "id": n, "segmentation": mask} for n, mask in enumerate(segmentations)]
    entries.append({**BOX, "category_id": "x", "iscrowd": 1, "bbox": [-5.5, 15, 10.5, 50]})
    instances, faults = read_objects(write_objects(tmp_path, entries))
    assert faults == []
    assert instances[2] == ()
    polygon_mask = coco_masks.merge(coco_masks.frPyObjects(polygons, HEIGHT, WIDTH))
    masks_of_objects = [polygon_mask["counts"].decode(), compressed, compressed, None, None]
    assert instances[1] == (
        *(Instance("boat", (2.0, 3.0, 12.0, 11.0), mask) for mask in masks_of_objects),
        Instance("moon", (0.0, 15.0, 5.0, 20.0), None, True),
    )
    assert (decode_mask(compressed, WIDTH, HEIGHT) == pixels.astype(bool)).all()


BAD_OBJECTS = [
    ({"category_id": 9}, "category_id 9 is not among the categories with a name"),
    ({"category_id": None}, "category_id None is not among the categories with a name"),
    ({"category_id": [[]]}, "category_id a list is not among the categories with a name"),
    ({"bbox": None}, "its bbox is no list of four numbers"),
    ({"bbox": [1, 2, 3]}, "its bbox is no list of four numbers"),
    ({"bbox": [1, 2, 3, "4"]}, "its bbox is no list of four numbers"),
    ({"bbox": [1, 2, 3, True]}, "its bbox is no list of four numbers"),
    ({"bbox": [1, 2, 0, 5]}, "its bbox has no area"),
    ({"bbox": [1, 2, 5, -5]}, "its bbox has no area"),
    ({"bbox": [30, 2, 5, 5]}, "its bbox is outside of the image"),
    ({"bbox": [-1e308, 2, 1e308, 5]}, "its bbox is outside of the image"),
    ({"bbox": [1, 2, 1e-320, 5]}, "its bbox is outside of the image"),
    ({"iscrowd": 2}, "its iscrowd is neither 0 nor 1"),
    ({"iscrowd": []}, "its iscrowd is neither 0 nor 1"),
    ({"segmentation": 7}, "its segmentation is a number"),
    ({"segmentation": SQUARE}, "a polygon of its segmentation is no list of three or more x and y"),
    ({"segmentation": [SQUARE[:4]]}, "a polygon of its segmentation is no list of three or more x and y"),
    ({"segmentation": [SQUARE[:7]]}, "a polygon of its segmentation is no list of three or more x and y"),
    ({"segmentation": [[*SQUARE, 1, None]]}, "a polygon of its segmentation is no list of three or more x and y"),
    ({"segmentation": [[*SQUARE, 1e300, 1]]}, "a polygon of its segmentation reaches far outside of the image"),
    ({"segmentation": [[*SQUARE, 1, -21]]}, "a polygon of its segmentation reaches far outside of the image"),
    ({"segmentation": [[31, 1, 35, 1, 35, 5]]}, "its mask has no pixel"),
    ({"segmentation": [[3.0, 3.0] * 3]}, "its mask has no pixel"),
    ({"segmentation": [[1, 1, 29, 19] * 20_000]}, "the outline of its segmentation is longer than 1,000,000 pixels"),
    ({"segmentation": [SQUARE] * 10_001}, "its segmentation has 10,001 polygons"),
    ({"segmentation": {}}, "its segmentation has no size of two numbers"),
    ({"segmentation": {"size": [20, None]}}, "its segmentation has no size of two numbers"),
    (
        {"segmentation": {"size": [30, 20], "counts": [600]}},
        "the size of its segmentation, [30, 20], is not that of the image, [20, 30]",
    ),
    ({"segmentation": {"size": [20, 30], "counts": [600]}}, "its mask has no pixel"),
    ({"segmentation": {"size": [20, 30], "counts": [10, 10]}}, "the counts of its segmentation have 20 pixels, and"),
    ({"segmentation": {"size": [20, 30], "counts": [0] * 2000}}, "the counts of its segmentation have 0 pixels, and"),
    ({"segmentation": {"size": [20, 30], "counts": [601, -1]}}, "the counts of its segmentation are no run lengths"),
    ({"segmentation": {"size": [20, 30], "counts": [300.0, 300]}}, "the counts of its segmentation are no run len"),
    ({"segmentation": {"size": [20, 30], "counts": None}}, "the counts of its segmentation are no run lengths"),
    ({"segmentation": {"size": [20, 30], "counts": ""}}, "the counts of its segmentation have 0 pixels, and its"),
    ({"segmentation": {"size": [20, 30], "counts": "o"}}, "the counts of its segmentation are cut off"),
    ({"segmentation": {"size": [20, 30], "counts": "o" * 99 + "0"}}, "the counts of its segmentation are no run len"),
    ({"segmentation": {"size": [20, 30], "counts": "ähm"}}, "the counts of its segmentation are no run lengths"),
    ({"segmentation": {"size": [20, 30], "counts": "O"}}, "the counts of its segmentation are no run lengths"),
]


@pytest.mark.parametrize(("fields", "detail"), BAD_OBJECTS)
def test_a_bad_object_is_quarantined_by_its_id(tmp_path, fields, detail):
    good_entry = {**BOX, "id": 41, "segmentation": [SQUARE]}
    path = write_objects(tmp_path, [good_entry, {**BOX, "id": 42, **fields}])
    instances, [fault] = read_objects(path)
    assert [len(objects) for objects in instances.values()] == [1, 0]
    assert (fault.path, fault.line, fault.reason) == (str(path), 2, Reason.BAD_OBJECT)
    assert fault.detail.startswith(f"annotation 42: {detail}")


def test_bad_annotations_and_images_are_reported_with_their_numbers(tmp_path):
    images = [
        {"id": 1, "file_name": "a.png", "width": 7, "height": "?"},
        {"id": 2, "file_name": "gone.png"},
        {"id": 1, "file_name": "b.png"},
        {"id": 4},
        {"id": 5, "file_name": "text.png"},
    ]
    (tmp_path / "text.png").write_text("no image")
    entries = [
        BOX,
        {**BOX, "image_id": 99},
        "nonsense",
        {**BOX, "image_id": [[]]},
        {**BOX, "image_id": 2},
        {**BOX, "id": [], "bbox": []},
    ]
    instances, faults = read_objects(write_objects(tmp_path, entries, images))
    assert {image_id: len(objects) for image_id, objects in instances.items()} == {1: 1}
    assert [(fault.line, fault.reason, fault.detail.partition(": no such")[0]) for fault in faults] == [
        (2, Reason.NO_IMAGE, "image_id 99 is not among its images"),
        (3, Reason.NO_IMAGE, "image_id None is not among its images"),
        (4, Reason.NO_IMAGE, "image_id a list is not among its images"),
        (6, Reason.BAD_OBJECT, "annotation a list: its bbox is no list of four numbers"),
        (2, Reason.NO_IMAGE, faults[4].detail.partition(": no such")[0]),
        (3, Reason.NO_IMAGE, "b.png: its id 1 is that of an earlier image"),
        (4, Reason.NO_IMAGE, "image 4 has no id and file_name"),
        (5, Reason.NOT_IMAGE, "text.png"),
    ]
    assert faults[4].detail.startswith("gone.png: no such file in ")


def test_the_size_is_that_of_the_upright_image(tmp_path):
    path = write_objects(tmp_path, [{**BOX, "bbox": [0, 0, 100, 100], "segmentation": [SQUARE]}])
    exif, sink = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.new("RGB", (WIDTH, HEIGHT)).save(sink, "jpeg", exif=exif.tobytes())
    (tmp_path / "a.png").write_bytes(sink.getvalue())
    instances, faults = read_objects(path)
    assert faults == []
    [instance] = instances[1]
    assert instance.box == (0.0, 0.0, 20.0, 30.0)
    assert (
        decode_mask(instance.mask, HEIGHT, WIDTH).sum()
        == decode_mask(encode_mask([SQUARE], WIDTH, HEIGHT), WIDTH, HEIGHT).sum()
    )


@pytest.mark.parametrize(
    ("content", "detail"),
    [
        (b'{"images": [], "annotations": [{"caption": "a"}]}', "no objects: name the files of instances by a pattern"),
        (b'{"images": [], "annotations": [{"bbox": []}]}', "it has no list 'categories'"),
        (b'{"images": [{"id": NaN}], "annotations": []}', "it is not JSON"),
        (b"[" * 5000, "it is not JSON"),
        (b"[]", "it has no lists 'images' and 'annotations'"),
    ],
)
def test_json_without_objects_is_reported(tmp_path, content, detail):
    (tmp_path / "instances.json").write_bytes(content)
    _, [fault] = read_objects(tmp_path)
    assert (fault.line, fault.reason) == (1, Reason.PART_LOST)
    assert detail in fault.detail


def test_deeply_nested_ids_are_named_without_an_error(tmp_path):
    path = tmp_path / "instances.json"
    nested = "[" * 1000 + "]" * 1000
    for columns, key in ((["image", "objects"], "bbox"), (["image", "text"], "caption")):
        path.write_text(f'{{"images": [], "categories": [], "annotations": [{{"{key}": 1, "image_id": {nested}}}]}}')
        [fault], _ = read_source(path, format="coco", columns=columns)
        assert fault.detail == "image_id a list is not among its images"


def test_missing_pycocotools_is_one_line(tmp_path, monkeypatch):
    path = write_objects(tmp_path, [])
    find_spec = annotations_module.importlib.util.find_spec
    monkeypatch.setattr(
        annotations_module.importlib.util, "find_spec", lambda name: None if name == "pycocotools" else find_spec(name)
    )
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(DataError, match=r"pycocotools is missing.*pip install 'mhmoe-ray\[vision\]'$"):
        read_objects(path)
    assert len(read_source(path, format="coco", columns=["image"])[0]) == 2


@given(seed=st.integers(0, 2**32), share=st.floats(0, 1), width=st.integers(1, 40), height=st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_run_lengths_of_pycocotools_stay_the_same(seed, share, width, height):
    pixels = (np.random.default_rng(seed).random((height, width)) < share).astype(np.uint8)
    pixels[0, 0] = 1
    encoded = coco_masks.encode(np.asfortranarray(pixels))["counts"].decode()
    assert decode_run_lengths(encoded, width * height) == uncompressed_counts(pixels)
    size = [height, width]
    assert encode_mask({"size": size, "counts": encoded}, width, height) == encoded
    # Runs of no pixels may stand anywhere, and the result has none but the first.
    counts = [part for count in uncompressed_counts(pixels) for part in (count // 2, 0, count - count // 2)]
    assert encode_mask({"size": size, "counts": [*counts, 0, 0]}, width, height) == encoded


def test_many_polygons_are_joined_like_a_few():
    random = np.random.default_rng(1)
    polygons = (random.random((200, 3, 2)) * [WIDTH, HEIGHT] * random.random((200, 1, 1))).reshape(200, 6).tolist()
    joined_mask = coco_masks.merge(coco_masks.frPyObjects(polygons, HEIGHT, WIDTH))
    assert encode_mask(polygons, WIDTH, HEIGHT) == joined_mask["counts"].decode()


def test_images_too_large_for_pycocotools_have_no_masks(monkeypatch):
    monkeypatch.setattr(masks, "MAX_PIXELS", 599)
    with pytest.raises(ObjectError, match="too many pixels"):
        encode_mask([SQUARE], WIDTH, HEIGHT)


NUMBERS = st.one_of(
    st.integers(-5, 35),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([0, 600, 2**31, 2**32, 2**63, 2**64 - 1, -(2**63), 1e308, -1e308, 0.1]),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=5))
VALUES = st.recursive(
    SCALARS,
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=3), children, max_size=3),
    max_leaves=12,
)
RUN_LENGTHS = st.one_of(
    st.text(st.characters(min_codepoint=48, max_codepoint=111), max_size=40),
    st.lists(st.integers(0, 600), max_size=30).map(lambda counts: [*counts, 600 - sum(counts)]),
    st.lists(NUMBERS, max_size=20),
    VALUES,
)
SEGMENTATIONS = st.one_of(
    st.lists(st.lists(st.floats(-40, 70) | NUMBERS, min_size=4, max_size=12), max_size=4),
    st.fixed_dictionaries({"size": st.just([HEIGHT, WIDTH]) | VALUES, "counts": RUN_LENGTHS}),
    VALUES,
)
ENTRIES = st.one_of(
    st.fixed_dictionaries(
        {"image_id": st.sampled_from([1, 2]) | VALUES, "category_id": st.sampled_from([3, "x"]) | VALUES},
        optional={
            "id": VALUES,
            "bbox": st.lists(NUMBERS, min_size=4, max_size=4) | VALUES,
            "segmentation": SEGMENTATIONS,
            "iscrowd": st.sampled_from([0, 1]) | VALUES,
        },
    ),
    VALUES,
)
TREES = st.fixed_dictionaries(
    {
        "annotations": st.lists(ENTRIES, max_size=8) | VALUES,
        "images": st.just([{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}])
        | st.lists(st.fixed_dictionaries({"id": VALUES, "file_name": st.just("a.png") | VALUES}), max_size=3),
        "categories": st.just(CATEGORIES)
        | st.lists(st.fixed_dictionaries({"id": VALUES, "name": VALUES}), max_size=3)
        | VALUES,
    }
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    write_objects(folder, [])
    return folder


@pytest.mark.long
@given(tree=TREES)
@settings(max_examples=EXAMPLES, deadline=None)
def test_hostile_json_never_raises(folder, tree):
    """Every image is a document or a fault, and every object that is read lies within its image."""
    (folder / "instances.json").write_text(json.dumps(tree))
    instances, _ = read_objects(folder / "instances.json")
    for objects in instances.values():
        for instance in objects:
            x_min, y_min, x_max, y_max = instance.box
            assert 0 <= x_min < x_max <= WIDTH
            assert 0 <= y_min < y_max <= HEIGHT
            assert instance.mask is None or decode_mask(instance.mask, WIDTH, HEIGHT).any()


@pytest.mark.long
@given(segmentation=SEGMENTATIONS)
@settings(max_examples=2 * EXAMPLES, deadline=None)
def test_hostile_masks_are_masks_or_errors(segmentation):
    try:
        counts = encode_mask(segmentation, WIDTH, HEIGHT)
    except ObjectError:
        return
    assert decode_mask(counts, WIDTH, HEIGHT).any()
    assert sum(decode_run_lengths(counts, WIDTH * HEIGHT)) == WIDTH * HEIGHT
