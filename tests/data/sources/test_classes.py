"""Tests of sources whose images have a class, in files that the tools of each format wrote."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature

from mhmoe_ray.data.images.annotations import Annotation, unpack
from mhmoe_ray.data.prepare.chunks import DocumentChunk, QuarantineLimit, read_chunks
from mhmoe_ray.data.sources import Reason, find_files
from mhmoe_ray.data.sources.find import file_blocks, fingerprints
from mhmoe_ray.data.sources.images import image_hash
from mhmoe_ray.data.sources.items import BadLine, Document
from mhmoe_ray.errors import DataError
from tests.data.sources.damage import flip_bit
from tests.data.sources.read import data_spec, read_source
from tests.support.images import make_images, write_image_folder, write_tar

IMAGES = make_images(12)
GOOD = IMAGES[0].image
NAMES = ["cat", "dog", "wren"]
CLASSES = [NAMES[number % 3] for number in range(12)]
EXPECTED = sorted((picture.image, name) for picture, name in zip(IMAGES, CLASSES, strict=True))
CLASS_COLUMNS = {"columns": ["image", "class"]}


def classes(items):
    """Return the sorted images and classes of documents, which must have nothing else."""
    documents = [item for item in items if isinstance(item, Document)]
    assert all(item.text == "" and item.image_hash == image_hash(item.image) for item in documents)
    annotations = [unpack(item.annotation) for item in documents]
    assert all(annotation == Annotation(annotation.class_name) for annotation in annotations)
    return sorted((item.image, note.class_name) for item, note in zip(documents, annotations, strict=True))


def faults(items):
    """Return the line, the reason and the detail of each item that could not be read."""
    return [(item.line, item.reason, item.detail) for item in items if isinstance(item, BadLine)]


def write_with_datasets(folder, names):
    """Write a data set of the package `datasets` with the classes as ClassLabel, by save_to_disk and to_parquet."""
    rows = [{"image": {"bytes": p.image, "path": p.name}, "label": c} for p, c in zip(IMAGES, CLASSES, strict=True)]
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=names)})
    dataset = Dataset.from_list(rows, features=features)
    dataset.save_to_disk(folder / "saved")
    (folder / "parquet").mkdir()
    dataset.to_parquet(folder / "parquet" / "rows.parquet")


def write_rows(path, labels, image=GOOD, **options):
    """Write a Parquet file whose rows have the same image, and these classes."""
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"image": [image] * len(labels), "label": labels}), path, **options)


def test_all_formats_yield_the_same_classes(tmp_path):
    write_with_datasets(tmp_path, NAMES)
    (tmp_path / "tar").mkdir()
    with webdataset.TarWriter(str(tmp_path / "tar" / "a.tar")) as sink:
        for picture, name in zip(IMAGES, CLASSES, strict=True):
            key, _, suffix = picture.name.partition(".")
            fields = {"cls": f"{name}\n", "json": {"name": name, "number": 7}, "txt": "a caption"}
            sink.write({"__key__": key, suffix: picture.image, **fields})
    for picture, name in zip(IMAGES, CLASSES, strict=True):
        deep_folder = ["images", ""][picture.name > "00005"]
        write_image_folder(tmp_path / "folder" / name / deep_folder, [picture])
    sources = {
        "saved": {"format": "huggingface"},
        "parquet": {"format": "parquet"},
        "tar": {"format": "webdataset"},
        "folder": {"format": "images"},
    }
    for name, keys in sources.items():
        items, tally = read_source(tmp_path / name, **keys, **CLASS_COLUMNS)
        assert classes(items) == EXPECTED, name
        assert not tally.bad
        assert len({item.line for item in items}) == 12
    items, _ = read_source(tmp_path / "tar", format="webdataset", class_field="json.name", **CLASS_COLUMNS)
    assert classes(items) == EXPECTED
    items, _ = read_source(tmp_path / "tar", format="webdataset", class_field="json.number", **CLASS_COLUMNS)
    assert {name for _, name in classes(items)} == {"7"}


def test_folders_of_classes_are_one_domain(tmp_path, monkeypatch):
    monkeypatch.setattr("mhmoe_ray.data.sources.find.IMAGES_BYTES", 3000)
    write_image_folder(tmp_path / "cat", IMAGES[:4])
    write_image_folder(tmp_path / "all" / "images" / "deep", IMAGES[4:8])
    write_image_folder(tmp_path, IMAGES[8:9])
    spec = data_spec(tmp_path, format="images", **CLASS_COLUMNS)
    files = find_files(spec)
    assert {file.domain for file in files} == {"web/all"}
    assert len(files) > 2
    assert all(file.path == str(tmp_path) for file in files)
    assert "cat/00000.png" in {member for file in files for member in file.members}
    items, _ = read_source(tmp_path, format="images", **CLASS_COLUMNS)
    expected = [(p.image, "cat") for p in IMAGES[:4]] + [(p.image, "all") for p in IMAGES[4:8]]
    assert classes(items) == sorted(expected)
    [fault] = [item for item in items if isinstance(item, BadLine)]
    assert fault == BadLine(str(tmp_path / IMAGES[8].name), 1, Reason.NO_CLASS, "it is in no folder of a class")
    first_hashes = fingerprints(spec, files)
    (tmp_path / "cat").rename(tmp_path / "dog")
    assert fingerprints(spec, find_files(spec)) != first_hashes
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "README").write_text("no image")
    with pytest.raises(DataError, match="web/empty"):
        find_files(spec)


def test_integers_without_names_are_their_own_classes(tmp_path):
    for data_type in (pa.int8(), pa.int64(), pa.uint16()):
        write_rows(tmp_path / "rows" / "a.parquet", pa.array([3, None, 11], data_type))
        items, _ = read_source(tmp_path / "rows", format="parquet", **CLASS_COLUMNS)
        assert [name for _, name in classes(items)] == ["11", "3"]
        assert faults(items) == [(2, Reason.NO_CLASS, "it is null")]


def test_columns_of_texts_and_dictionaries(tmp_path):
    labels = ["cat", None, " ", "dog"]
    for array in (
        pa.array(labels),
        pa.array(labels, pa.large_string()),
        pa.array(labels).dictionary_encode(),
        pa.array(labels, pa.string_view()),
    ):
        write_rows(tmp_path / "rows" / "a.parquet", array)
        items, _ = read_source(tmp_path / "rows", format="parquet", **CLASS_COLUMNS)
        assert [name for _, name in classes(items)] == ["cat", "dog"]
        assert faults(items) == [(2, Reason.NO_CLASS, "it is null"), (3, Reason.NO_CLASS, "its name is empty")]
    numbers = pa.array([5, 7, 5]).dictionary_encode()
    write_rows(tmp_path / "rows" / "a.parquet", numbers)
    items, _ = read_source(tmp_path / "rows", format="parquet", **CLASS_COLUMNS)
    assert [name for _, name in classes(items)] == ["5", "5", "7"]


def test_integers_outside_of_the_names_have_no_class(tmp_path):
    features = Features({"image": Value("binary"), "kind": ClassLabel(names=NAMES)})
    schema = features.arrow_schema
    table = pa.table({"image": [GOOD] * 4, "kind": pa.array([-1, 2, 3, None], pa.int64())}, schema=schema)
    pq.write_table(table, tmp_path / "a.parquet")
    items, _ = read_source(tmp_path, format="parquet", class_field="kind", **CLASS_COLUMNS)
    assert classes(items) == [(GOOD, "wren")]
    assert faults(items) == [
        (1, Reason.NO_CLASS, "-1 is the number of none of its 3 classes"),
        (3, Reason.NO_CLASS, "3 is the number of none of its 3 classes"),
        (4, Reason.NO_CLASS, "it is null"),
    ]


@pytest.mark.parametrize(
    "metadata",
    [b"", b"{", b"[]", b'{"info": 1}', b'{"info": {"features": {"label": {"names": [1, {}]}}}}', b"[" * 5000],
)
def test_damaged_names_of_classes_are_ignored(tmp_path, metadata):
    table = pa.table({"image": [GOOD], "label": [2]}).replace_schema_metadata({b"huggingface": metadata})
    pq.write_table(table, tmp_path / "a.parquet")
    assert classes(read_source(tmp_path, format="parquet", **CLASS_COLUMNS)[0]) == [(GOOD, "2")]


def test_a_missing_column_or_another_type_is_reported_once(tmp_path):
    write_rows(tmp_path / "rows" / "a.parquet", [0.5, 1.5])
    details = {
        "label": "its column 'label' holds double, not classes",
        "kind": "it has no column 'kind'; it has 'image', 'label'",
    }
    for class_field, detail in details.items():
        items, _ = read_source(tmp_path / "rows", format="parquet", class_field=class_field, **CLASS_COLUMNS)
        assert faults(items) == [(1, Reason.PART_LOST, detail)]
        assert len(items) == 1


def test_the_reader_of_classes_survives_damage(tmp_path):
    """Rows of other row groups than the damaged one are read."""
    path = tmp_path / "rows" / "a.parquet"
    options = {"row_group_size": 4, "write_page_checksum": True, "use_dictionary": False, "compression": "none"}
    write_rows(path, CLASSES, **options)
    column = pq.read_metadata(path).row_group(1).column(1)
    content = path.read_bytes()
    path.write_bytes(flip_bit(content, column.data_page_offset + column.total_compressed_size - 2))
    items, _ = read_source(path.parent, format="parquet", **CLASS_COLUMNS)
    assert [name for _, name in classes(items)] == sorted(CLASSES[:4] + CLASSES[8:])
    assert [(line, reason) for line, reason, _ in faults(items)] == [(5, Reason.PART_LOST)]


def test_webdataset_quarantines_samples_without_class(tmp_path):
    contents = {"a": b" dog \n", "b": b"gr\xfc\xdfe", "c": b" ", "d": b"\xef\xbb\xbf7"}
    members = [("none.png", GOOD)]
    for key, content in contents.items():
        members += [(f"{key}.png", GOOD), (f"{key}.cls", content)]
    members += [("broken.png", b"no image"), ("broken.cls", b"7")]
    write_tar(tmp_path / "a.tar", members)
    items, _ = read_source(tmp_path, format="webdataset", **CLASS_COLUMNS)
    assert [name for _, name in classes(items)] == ["7", "dog"]
    assert faults(items) == [
        (1, Reason.NO_CLASS, "none: no member .cls"),
        (4, Reason.NOT_UTF8, "b: byte 3 of the class"),
        (6, Reason.NO_CLASS, "c: its name is empty"),
        (10, Reason.NOT_IMAGE, "broken"),
    ]


def test_webdataset_quarantines_classes_in_json(tmp_path):
    values = ['{"kind": "dog"}', '{"kind": 12}', '{"kind": true}', '{"kind": 1.5}', '{"kind": null}', "{}", "[]", "{"]
    values += ['{"kind": "\\ud800"}', '{"kind": ' + "9" * 5000 + "}"]
    members = []
    for number, value in enumerate(values):
        members += [(f"{number}.png", GOOD), (f"{number}.json", value.encode())]
    write_tar(tmp_path / "a.tar", members)
    items, _ = read_source(tmp_path, format="webdataset", class_field="json.kind", **CLASS_COLUMNS)
    assert [name for _, name in classes(items)] == ["12", "dog"]
    assert [(line, reason) for line, reason, _ in faults(items)] == [
        (5, Reason.NO_CLASS),
        (7, Reason.NO_CLASS),
        (9, Reason.NO_CLASS),
        (11, Reason.NO_CLASS),
        (13, Reason.NO_CLASS),
        (15, Reason.NOT_JSON),
        (17, Reason.SURROGATE),
        (19, Reason.NOT_JSON),
    ]
    assert faults(items)[0][2] == "2: 'kind' in .json is true or false"


def test_chunks_have_the_annotations(tmp_path):
    for name in NAMES:
        write_image_folder(tmp_path / "folder" / name, IMAGES[:2])
    spec = data_spec(tmp_path / "folder", format="images", **CLASS_COLUMNS)
    files = find_files(spec)
    [chunk] = [
        DocumentChunk.from_table(table)
        for block in file_blocks(files)
        for table in read_chunks(
            block, spec=spec, limit=QuarantineLimit(spec, files), quarantine=tmp_path / "out", characters=1 << 30
        )
    ]
    assert [json.loads(document.annotation) for document in chunk.documents] == [
        {"class": n} for n in sorted(NAMES * 2)
    ]
    assert [document.text for document in chunk.documents] == [""] * 6
    plain_spec = data_spec(tmp_path / "folder", format="images")
    [*tables] = read_chunks(
        file_blocks(find_files(plain_spec))[0],
        spec=plain_spec,
        limit=QuarantineLimit(plain_spec, []),
        quarantine=tmp_path / "out",
        characters=1 << 30,
    )
    assert all(document.annotation is None for document in DocumentChunk.from_table(tables[0]).documents)
