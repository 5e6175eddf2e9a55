"""Tests of the readers of images: all formats yield the same documents, and bad records are quarantined singly."""

import gzip
import io
import json
import os
import sys
import tarfile
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import fs

from mhmoe_ray.data.images import files
from mhmoe_ray.data.sources import FileReader, Reason, find, find_files, version_hash
from mhmoe_ray.data.sources.find import file_blocks, fingerprints
from mhmoe_ray.data.sources.images import image_hash
from mhmoe_ray.data.sources.items import BadLine, Document, RawFile
from mhmoe_ray.data.sources.storage import CHUNK_BYTES
from mhmoe_ray.errors import DataError
from mhmoe_ray.spec import DataSpec
from tests.data.sources.damage import apply_edits, edit_lists, flip_bit
from tests.data.sources.read import bad_lines, data_spec, document_texts, iterate_source, read_source
from tests.support.image_packages import write_with_datasets, write_with_webdataset
from tests.support.images import (
    bomb,
    encode_image,
    jpeg_of_scans,
    make_images,
    tar_members,
    tiff_of_tile,
    write_coco,
    write_image_folder,
    write_parquet,
    write_tar,
)

IMAGES = make_images(12)
PAIRS = sorted((picture.image, picture.caption) for picture in IMAGES)
BOTH_COLUMNS = {"columns": ["image", "text"]}


def pairs(items):
    """Return the sorted images and texts of documents."""
    assert all(isinstance(item, Document) for item in items), [item for item in items if isinstance(item, BadLine)]
    return sorted((item.image, item.text) for item in items)


def faults(items):
    """Return the line, the reason and the detail of each item that could not be read."""
    return [(item.line, item.reason, item.detail) for item in items if isinstance(item, BadLine)]


def test_all_formats_yield_the_same_documents(tmp_path):
    write_with_webdataset(tmp_path / "tar", IMAGES)
    write_with_datasets(tmp_path, IMAGES)
    write_parquet(tmp_path / "plain" / "rows.parquet", IMAGES, "jpg")
    write_coco(tmp_path / "coco", IMAGES)
    sources = {
        "tar": {"format": "webdataset"},
        "saved": {"format": "huggingface", **BOTH_COLUMNS},
        "parquet": {"format": "parquet", **BOTH_COLUMNS},
        "plain": {"format": "parquet", "image_field": "jpg", **BOTH_COLUMNS},
        "coco/annotations": {"format": "coco"},
    }
    for name, keys in sources.items():
        items, tally = read_source(tmp_path / name, **keys)
        assert pairs(items) == PAIRS, name
        assert all(item.image_hash == image_hash(item.image) for item in items)
        assert tally.bytes_read == sum(file.size for file in find_files(data_spec(tmp_path / name, **keys)))
    write_image_folder(tmp_path / "folder" / "a", IMAGES[:5])
    write_image_folder(tmp_path / "folder" / "b" / "deep", IMAGES[5:])
    items, _ = read_source(tmp_path / "folder", format="images")
    assert pairs(items) == sorted((picture.image, "") for picture in IMAGES)


@pytest.mark.parametrize("columns", [["text"], ["image"]])
def test_sources_of_one_column_have_the_hashes_of_images(tmp_path, columns):
    write_with_webdataset(tmp_path / "tar", IMAGES)
    write_with_datasets(tmp_path, IMAGES)
    write_coco(tmp_path / "coco", IMAGES)
    sources = {"tar": "webdataset", "coco/annotations": "coco", "saved": "huggingface", "parquet": "parquet"}
    expected = sorted(
        (image_hash(p.image), p.caption if columns == ["text"] else "", p.image if columns == ["image"] else None)
        for p in IMAGES
    )
    for name, format in sources.items():
        tree = {"path": str(tmp_path / name), "format": format, "columns": columns}
        # Hashes of images in Parquet and Arrow files are read only if another source has images.
        spec = data_spec(tmp_path, format="images").model_copy(update={"sources": {}})
        sources_spec = data_spec(**tree).sources | {"other": data_spec(tmp_path, format="images").sources["web"]}
        spec = spec.model_copy(update={"sources": sources_spec})
        documents = [document for file in find_files(spec, ["web"]) for document in FileReader(file, spec)]
        assert sorted((d.image_hash, d.text, d.image) for d in documents) == expected, name
    items, _ = read_source(tmp_path / "parquet")
    assert document_texts(items) == [picture.caption for picture in IMAGES]
    assert all(item.image_hash is None for item in items)


@pytest.mark.parametrize("format", ["parquet", "huggingface"])
def test_texts_have_the_hash_of_the_image_that_another_source_of_their_records_uses(tmp_path, format):
    """A source of texts hashes the image column that the source of pairs names, unless it names one itself."""
    photos, thumbnails = IMAGES[:6], IMAGES[6:]
    table = pa.table(
        {
            "image": [picture.image for picture in thumbnails],
            "photo": [picture.image for picture in photos],
            "text": [picture.caption for picture in photos],
        }
    )
    folder = tmp_path / "pairs"
    if format == "parquet":
        folder.mkdir()
        pq.write_table(table, folder / "rows.parquet")
    else:
        Dataset(table).save_to_disk(folder)
    # `other` has no files. Its image column, `image`, is in the table too, but must not be hashed.
    sources = {
        "other": {"path": str(tmp_path / "other"), "format": format, **BOTH_COLUMNS},
        "photos": {"path": str(folder), "format": format, "image_field": "photo", **BOTH_COLUMNS},
        "texts": {"path": str(folder), "format": format},
        "copy": {"path": str(folder / "*"), "format": format, "image_field": "photo"},
    }
    spec = DataSpec.model_validate({"sources": sources, "prepared": "prepared"})
    expected = [(picture.caption, image_hash(picture.image)) for picture in photos]
    for name in ("photos", "texts", "copy"):
        documents = [item for file in find_files(spec, [name]) for item in FileReader(file, spec)]
        assert [(d.text, d.image_hash) for d in documents] == expected, name
    sources["copy"]["image_field"] = "photograph"
    spec = DataSpec.model_validate({"sources": sources, "prepared": "prepared"})
    [item] = [item for file in find_files(spec, ["copy"]) for item in FileReader(file, spec)]
    assert item.detail == "it has no column 'photograph'; it has 'image', 'photo', 'text'"


def test_images_only_need_no_captions(tmp_path):
    write_tar(tmp_path / "a.tar", [(picture.name, picture.image) for picture in IMAGES])
    items, _ = read_source(tmp_path, format="webdataset", columns=["image"])
    assert pairs(items) == sorted((picture.image, "") for picture in IMAGES)
    assert [item.line for item in items] == list(range(1, 13))


GOOD = IMAGES[0]
BAD_IMAGES = {
    "text": (b"this is no image", Reason.NOT_IMAGE),
    "empty": (b"", Reason.NOT_IMAGE),
    "bomb": (bomb(), Reason.TOO_MANY_PIXELS),
    "scans": (jpeg_of_scans(21), Reason.IMAGE_LIMIT),
    "narrow": (bomb(40_000, 1), Reason.IMAGE_LIMIT),
    "tile": (tiff_of_tile(60_000), Reason.TOO_MANY_PIXELS),
    "cut": (IMAGES[1].image[: len(IMAGES[1].image) // 2], Reason.DAMAGED_IMAGE),
    "flipped": (flip_bit(GOOD.image, len(GOOD.image) // 2), Reason.DAMAGED_IMAGE),
    "large": (encode_image(np.zeros((2100, 500, 3), np.uint8)), Reason.TOO_MANY_PIXELS),
    "long": (encode_image(np.random.default_rng(1).integers(0, 256, (250, 250, 3), np.uint8)), Reason.TOO_LONG),
}
LIMITS = {"max_document_mb": 0.1}


def one_megapixel_spec(path, **source):
    spec = data_spec(path, **LIMITS, **source)
    return spec.model_copy(update={"images": spec.images.model_copy(update={"max_megapixels": 1.0})})


def read_with_limits(path, **source):
    spec = one_megapixel_spec(path, **source)
    return [item for file in find_files(spec) for item in FileReader(file, spec)]


def test_webdataset_quarantines_bad_samples_only(tmp_path):
    members = tar_members(IMAGES[:2])
    for name, (image, _) in BAD_IMAGES.items():
        members += [(f"bad/{name}.png", image), (f"bad/{name}.txt", b"a caption")]
    bad_captions = {
        "latin": (b"gr\xfc\xdfe", Reason.NOT_UTF8, "latin: byte 3 of the caption"),
        "blank": (b" \n", Reason.EMPTY, "blank"),
        "huge": (b"x" * 100_001, Reason.TOO_LONG, "huge: 100,001 bytes in .txt"),
    }
    for name, (caption, *_) in bad_captions.items():
        members += [(f"{name}.png", GOOD.image), (f"{name}.txt", caption)]
    members += [("alone.png", GOOD.image), ("dumb.txt", b"no image"), ("neither.cls", b"3")]
    members += [("README", b"skipped"), ("._a.png", b"skipped"), *tar_members(IMAGES[2:4])]
    write_tar(tmp_path / "a.tar", members)
    items = read_with_limits(tmp_path, format="webdataset")
    assert pairs([i for i in items if isinstance(i, Document)]) == sorted((p.image, p.caption) for p in IMAGES[:4])
    numbers = {name: number for number, (name, _) in enumerate(members, start=1)}
    expected = [(numbers[f"bad/{name}.png"], reason, f"bad/{name}") for name, (_, reason) in BAD_IMAGES.items()]
    expected += [(numbers[f"{name}.png"], reason, detail) for name, (_, reason, detail) in bad_captions.items()]
    expected += [
        (numbers["alone.png"], Reason.NO_TEXT, "alone: no member .txt"),
        (numbers["dumb.txt"], Reason.NO_IMAGE, "dumb"),
        (numbers["neither.cls"], Reason.NO_IMAGE, "neither"),
    ]
    assert [(line, reason) for line, reason, _ in faults(items)] == [(line, reason) for line, reason, _ in expected]
    assert all(detail.startswith(start) for (*_, detail), (*_, start) in zip(faults(items), expected, strict=True))


def test_all_other_formats_quarantine_bad_images_only(tmp_path):
    good = IMAGES[:1]
    named_images = [(f"{name}.png", image) for name, (image, _) in BAD_IMAGES.items()]
    pictures = [*(good[0]._replace(name=name, image=image) for name, image in named_images), *good]
    reasons = [reason for _, reason in BAD_IMAGES.values()]
    write_parquet(tmp_path / "parquet" / "rows.parquet", pictures)
    write_image_folder(tmp_path / "folder", pictures)
    write_coco(tmp_path / "coco", pictures)
    for name, keys in {
        "parquet": {"format": "parquet", **BOTH_COLUMNS},
        "coco/annotations": {"format": "coco"},
        "folder": {"format": "images"},
    }.items():
        items = read_with_limits(tmp_path / name, **keys)
        assert [item.image for item in items if isinstance(item, Document)] == [good[0].image]
        assert sorted(reason for _, reason, _ in faults(items)) == sorted(reasons), name
        if name != "folder":
            assert [line for line, *_ in faults(items)] == list(range(1, 1 + len(BAD_IMAGES)))
        else:
            assert [(i.path.rpartition("/")[2], i.line) for i in items if isinstance(i, BadLine)] == sorted(
                (image_name, 1) for image_name, _ in named_images
            )


def test_webdataset_caption_in_json(tmp_path):
    captions = {
        "a": '{"caption": "a boat"}',
        "b": '{"caption": null}',
        "c": "[]",
        "d": "{",
        "e": '{"caption": "\\ud800"}',
    }
    members = [
        member
        for key, text in captions.items()
        for member in ((f"{key}.jpg", IMAGES[1].image), (f"{key}.json", text.encode()))
    ]
    write_tar(tmp_path / "a.tar", members)
    items, _ = read_source(tmp_path, format="webdataset", text_field="json.caption")
    assert document_texts(items) == ["a boat"]
    assert [(line, reason) for line, reason, _ in faults(items)] == [
        (3, Reason.NO_TEXT),
        (5, Reason.NO_TEXT),
        (7, Reason.NOT_JSON),
        (9, Reason.SURROGATE),
    ]
    assert faults(items)[0][2] == "b: 'caption' in .json is null"


def test_webdataset_captions_by_language(tmp_path):
    """Each caption is a document with the image of its sample, and a broken image is one line of the quarantine."""
    captions = {
        "a": {"en": "a boat", "de": "ein Boot", "fr": 7},
        "b": {"de": "ein Baum"},
        "c": {"it": "un cane"},
        "broken": {"en": "a hill", "de": "ein Berg", "fr": None},
    }
    members = [
        member
        for key, texts in captions.items()
        for member in (
            (f"{key}.jpg", b"broken" if key == "broken" else IMAGES[1].image),
            (f"{key}.json", json.dumps({"names": texts}).encode()),
        )
    ]
    write_tar(tmp_path / "a.tar", members)
    items, _ = read_source(tmp_path, format="webdataset", text_field="json.names")
    documents = [(item.text, item.language, item.image) for item in items if isinstance(item, Document)]
    expected = [("a boat", "en"), ("ein Boot", "de"), ("ein Baum", "de"), ("un cane", "it")]
    assert documents == [(*caption, IMAGES[1].image) for caption in expected]
    assert faults(items) == [
        (1, Reason.NO_TEXT, "a: 'names.fr' in .json is a number"),
        (7, Reason.NOT_IMAGE, "broken"),
    ]
    languages = {"text_field": "json.names", "languages": ["en", "de"]}
    items, _ = read_source(tmp_path, format="webdataset", **languages)
    assert document_texts(items) == ["a boat", "ein Boot", "ein Baum"]
    # An image without a caption in these languages is left out, and is no fault.
    assert faults(items) == [(7, Reason.NOT_IMAGE, "broken")]


@pytest.mark.parametrize("image", ["link", "too long"])
def test_captions_alone_need_no_usable_image(tmp_path, image):
    content = json.dumps({"names": {"en": "a boat", "de": "ein Boot"}}).encode()
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        member = tarfile.TarInfo("a.png")
        if image == "link":
            member.type, member.linkname = tarfile.SYMTYPE, "b.png"
        else:
            member.size = 2000
        tar.addfile(member, io.BytesIO(bytes(member.size)))
        record = tarfile.TarInfo("a.json")
        record.size = len(content)
        tar.addfile(record, io.BytesIO(content))
    source = {"path": str(tmp_path), "format": "webdataset", "text_field": "json.names"}
    # A second source has images, so that the first one reads their hashes.
    sources = {"web": source | {"columns": ["text"]}, "pairs": source}
    tree = {"sources": sources, "prepared": "prepared", "max_document_mb": 0.001}
    spec = DataSpec.model_validate(tree)
    [file] = find_files(spec, ["web"])
    assert document_texts([*FileReader(file, spec)]) == ["a boat", "ein Boot"]


def test_webdataset_takes_the_preferred_image_of_a_key(tmp_path):
    members = [("a.jpg", IMAGES[1].image), ("a.PNG", IMAGES[0].image), ("a.seg.png", b"mask"), ("a.txt", b"boat")]
    write_tar(tmp_path / "a.tar", members)
    assert pairs(read_source(tmp_path, format="webdataset")[0]) == [(IMAGES[0].image, "boat")]


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstandard.compress])
def test_truncated_tar_yields_all_before_the_cut(tmp_path, compress):
    write_tar(tmp_path / "whole.tar", tar_members(IMAGES))
    content = (tmp_path / "whole.tar").read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        ends = [member.offset_data + member.size for member in tar.getmembers()]
    (tmp_path / "whole.tar").unlink()
    for length in (0, 100, ends[4] - 3, ends[5], ends[5] + 700, ends[23], -(-ends[23] // 512) * 512):
        (tmp_path / "a.tar").write_bytes(compress(content[:length]))
        items, tally = read_source(tmp_path, format="webdataset")
        complete = sum(end <= length for end in ends[1::2])
        assert document_texts(items) == [picture.caption for picture in IMAGES[:complete]]
        [(line, reason, _)] = faults(items)
        assert reason is Reason.PART_LOST
        assert 2 * complete < line <= 2 * complete + 2
        assert tally.damaged == 1


def test_damaged_tar_header_is_reported(tmp_path):
    write_tar(tmp_path / "a.tar", tar_members(IMAGES))
    with tarfile.open(tmp_path / "a.tar") as tar:
        offset = tar.getmembers()[6].offset
    content = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(flip_bit(content, offset + 3))
    items, _ = read_source(tmp_path, format="webdataset")
    assert document_texts(items) == [picture.caption for picture in IMAGES[:3]]
    assert faults(items) == [(7, Reason.PART_LOST, "the header after 6 members is damaged")]
    # A hole of zeros looks like the end mark, but more follows.
    (tmp_path / "a.tar").write_bytes(content[:offset] + bytes(1024) + content[offset + 1024 :])
    assert faults(read_source(tmp_path, format="webdataset")[0]) == [
        (7, Reason.PART_LOST, "its end mark is followed by other bytes")
    ]
    (tmp_path / "a.tar").write_bytes(b"hello" * 500)
    assert faults(read_source(tmp_path, format="webdataset")[0])[0][2] == "it is not a tar file"


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_formats_with_long_names_and_links(tmp_path, tar_format):
    folder = "/".join(["a-folder-of-a-long-name"] * (9 if tar_format != tarfile.USTAR_FORMAT else 4))
    with tarfile.open(tmp_path / "a.tar", "w", format=tar_format) as tar:
        directory = tarfile.TarInfo("folder.jpg")
        directory.type = tarfile.DIRTYPE
        tar.addfile(directory)
        for key in ("ähre", "b"):
            for suffix, content in (("png", GOOD.image), ("txt", key.encode())):
                member = tarfile.TarInfo(f"{folder}/{key}.{suffix}")
                member.size, member.mtime = len(content), 1.5 if tar_format == tarfile.PAX_FORMAT else 1
                tar.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("c.png")
        link.type, link.linkname = tarfile.SYMTYPE, "b.png"
        tar.addfile(link)
    items, _ = read_source(tmp_path, format="webdataset")
    assert pairs([i for i in items if isinstance(i, Document)]) == [(GOOD.image, "b"), (GOOD.image, "ähre")]
    assert [item.line for item in items] == [2, 4, 6]
    assert faults(items) == [(6, Reason.NO_IMAGE, "c: .png is a link or another special file")]


def test_linked_caption_is_no_text_rather_than_no_image(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        image = tarfile.TarInfo("a.png")
        image.size = len(GOOD.image)
        tar.addfile(image, io.BytesIO(GOOD.image))
        link = tarfile.TarInfo("a.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "b.txt"
        tar.addfile(link)
    items, _ = read_source(tmp_path, format="webdataset")
    assert faults(items) == [(1, Reason.NO_TEXT, "a: .txt is a link or another special file")]


def test_webdataset_reader_holds_one_sample(tmp_path):
    noise = os.urandom(1 << 20)
    members = [
        member
        for i in range(60)
        for member in ((f"{i:03d}.npy", noise), *tar_members([GOOD._replace(name=f"{i:03d}.png")]))
    ]
    write_tar(tmp_path / "a.tar", members)
    tracemalloc.start()
    assert sum(1 for _ in iterate_source(tmp_path, format="webdataset")) == 60
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * CHUNK_BYTES


def test_coco_documents_are_annotations(tmp_path):
    path = write_coco(tmp_path, IMAGES[:3])
    write_image_folder(tmp_path / "train2017", [IMAGES[3]])
    tree = json.loads(path.read_text())
    tree["annotations"] += [
        {"image_id": 0, "caption": "again"},
        {"image_id": 99, "caption": "no such image"},
        {"image_id": 1, "caption": 7},
        "nonsense",
        {"image_id": 2, "caption": " "},
    ]
    tree["images"] += [
        {"id": 3, "file_name": "gone.jpg"},
        {"id": 4},
        {"id": 5, "file_name": "../../etc/passwd"},
        {"id": 6, "file_name": IMAGES[0].name},
        {"id": 1, "file_name": IMAGES[3].name},
    ]
    tree["annotations"] += [{"image_id": 3, "caption": "gone"}, {"image_id": 5, "caption": "elsewhere"}]
    path.write_text(json.dumps(tree))
    items, _ = read_source(path, format="coco")
    assert [(i.line, i.text) for i in items if isinstance(i, Document)] == [
        (1, IMAGES[0].caption),
        (4, "again"),
        (2, IMAGES[1].caption),
        (3, IMAGES[2].caption),
    ]
    assert [(line, reason) for line, reason, _ in faults(items)] == [
        (5, Reason.NO_IMAGE),
        (7, Reason.NO_IMAGE),
        (6, Reason.NO_TEXT),
        (8, Reason.EMPTY),
        (9, Reason.NO_IMAGE),
        (5, Reason.NO_IMAGE),
        (10, Reason.NO_IMAGE),
        (7, Reason.NO_TEXT),
        (8, Reason.NO_IMAGE),
    ]
    assert faults(items)[-2][2] == f"{IMAGES[0].name}: the image has no caption"
    assert faults(items)[-1][2] == f"{IMAGES[3].name}: its id 1 is that of an earlier image"
    texts, _ = read_source(path, format="coco", columns=["text"])
    assert document_texts(texts) == [*document_texts(items), "gone", "elsewhere"]
    assert faults(texts)[-1] == faults(items)[-1]
    # A source of images alone reads no annotations, so two of its images may have the same id.
    assert len(read_source(path, format="coco", columns=["image"])[0]) == 8


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"images": [], "annotations": [{"bbox": []}]}'])
def test_json_that_is_not_cocos_is_reported(tmp_path, content):
    (tmp_path / "captions.json").write_bytes(content)
    assert bad_lines(read_source(tmp_path, format="coco")[0]) == [(1, Reason.PART_LOST)]


def test_coco_images_may_be_in_four_folders(tmp_path):
    path = write_coco(tmp_path, IMAGES)
    for folder in (tmp_path, tmp_path / "annotations", tmp_path / "annotations" / "train2017"):
        for file in (*tmp_path.rglob("*.png"), *tmp_path.rglob("*.jpg"), *tmp_path.rglob("*.webp")):
            folder.mkdir(exist_ok=True)
            file.rename(folder / file.name)
        assert pairs(read_source(path, format="coco")[0]) == PAIRS


def test_a_folder_of_images_is_a_few_files(tmp_path, monkeypatch):
    monkeypatch.setattr(find, "IMAGES_BYTES", 3000)
    write_image_folder(tmp_path / "a", IMAGES[:6])
    write_image_folder(tmp_path / "b" / "deep", IMAGES[6:9])
    write_image_folder(tmp_path, IMAGES[9:])
    (tmp_path / "b" / "SHOUTED.JPG").write_bytes(IMAGES[1].image)
    (tmp_path / "labels.txt").write_text("not an image")
    spec = data_spec(tmp_path, format="images")
    files = find_files(spec)
    assert {file.domain for file in files} == {"web/a", "web/b", "web/all"}
    assert 3 < len(files) < 13
    assert all(file.size < 6000 for file in files)
    assert sorted(path for file in files for path in file.stored_paths) == sorted(
        str(path) for path in tmp_path.rglob("*.*") if path.is_file() and path.suffix != ".txt"
    )
    rows = [row for block in file_blocks(files) for row in block.to_pylist()]
    assert [RawFile.from_row(row) for row in rows] == files
    first_hashes = fingerprints(spec, files), version_hash(spec, files)
    (tmp_path / "b" / "deep" / IMAGES[6].name).rename(tmp_path / "b" / "deep" / "other.png")
    files = find_files(spec)
    assert fingerprints(spec, files) != first_hashes[0]
    assert version_hash(spec, files) != first_hashes[1]
    (tmp_path / "a" / IMAGES[2].name).unlink()
    items = [item for file in files for item in FileReader(file, spec)]
    assert faults(items) == [(1, Reason.PART_LOST, "it no longer exists")]
    assert len(items) == 13


def test_parquet_quarantines_rows_without_image_or_caption(tmp_path):
    image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [
        {"image": {"bytes": GOOD.image, "path": "a.png"}, "text": "a boat"},
        {"image": {"bytes": None, "path": "b.png"}, "text": "a path alone"},
        {"image": None, "text": "nothing"},
        {"image": {"bytes": GOOD.image, "path": None}, "text": None},
        {"image": {"bytes": GOOD.image, "path": None}, "text": " "},
        {"image": {"bytes": GOOD.image, "path": None}, "text": "the last"},
    ]
    table = pa.Table.from_pylist(rows, pa.schema([("image", image_type), ("text", pa.string())]))
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    items, _ = read_source(tmp_path, format="parquet", **BOTH_COLUMNS)
    assert pairs([i for i in items if isinstance(i, Document)]) == [(GOOD.image, "a boat"), (GOOD.image, "the last")]
    no_bytes = "its bytes are null: only the path of a file may be stored"
    assert faults(items) == [
        (2, Reason.NO_IMAGE, no_bytes),
        (3, Reason.NO_IMAGE, no_bytes),
        (4, Reason.NO_TEXT, "it is null"),
        (5, Reason.EMPTY, ""),
    ]


def test_parquet_of_addresses_is_refused(tmp_path):
    pq.write_table(pa.table({"URL": ["https://example.org/a.jpg"], "TEXT": ["a boat"]}), tmp_path / "a.parquet")
    [item], _ = read_source(tmp_path, format="parquet", **BOTH_COLUMNS)
    assert item.message.endswith("'URL', 'TEXT'; download the images with img2dataset first)")
    [item], _ = read_source(tmp_path, format="parquet", image_field="URL", **BOTH_COLUMNS)
    assert item.message.endswith("holds string, not images: download them with img2dataset first)")


def test_parquet_reader_of_images_survives_damage(tmp_path):
    """Rows of other row groups than the damaged one are read."""
    path = tmp_path / "a.parquet"
    write_parquet(path, IMAGES)
    table = pq.read_table(path)
    pq.write_table(table, path, row_group_size=4, write_page_checksum=True, use_dictionary=False)
    column = pq.read_metadata(path).row_group(1).column(0)
    content = path.read_bytes()
    path.write_bytes(flip_bit(content, column.data_page_offset + column.total_compressed_size // 2))
    items, _ = read_source(tmp_path, format="parquet", **BOTH_COLUMNS)
    assert document_texts(items) == [picture.caption for picture in IMAGES[:4] + IMAGES[8:]]
    assert bad_lines(items) == [(5, Reason.PART_LOST)]


def test_s3_sources_of_images_read_like_local_ones(tmp_path, s3):
    query, file_system = s3
    write_with_webdataset(tmp_path / "tar", IMAGES)
    write_coco(tmp_path / "coco", IMAGES)
    write_image_folder(tmp_path / "folder" / "a", IMAGES)
    write_parquet(tmp_path / "parquet" / "rows.parquet", IMAGES)
    sources = {
        "tar": {"format": "webdataset"},
        "coco/annotations": {"format": "coco"},
        "folder": {"format": "images"},
        "parquet": {"format": "parquet", **BOTH_COLUMNS},
    }
    for name in ("tar", "coco", "folder", "parquet"):
        fs.copy_files(str(tmp_path / name), f"bucket/pictures/{name}", destination_filesystem=file_system)
    for name, keys in sources.items():
        local_items, local_tally = read_source(tmp_path / name, **keys)
        remote_items, remote_tally = read_source(f"s3://bucket/pictures/{name}?{query}", **keys)
        assert remote_items == local_items
        assert remote_tally == local_tally
        assert len(local_items) == 12
    file_system.delete_file(f"bucket/pictures/coco/train2017/{IMAGES[0].name}")
    items, _ = read_source(f"s3://bucket/pictures/coco/annotations?{query}", format="coco")
    assert [reason for _, reason, _ in faults(items)] == [Reason.NO_IMAGE]
    assert len(items) == 12


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_webdataset_reader_survives_damage(tmp_path, data):
    """Samples before the damage are read, and the reader raises no error."""
    write_tar(tmp_path / "a.tar", tar_members(IMAGES))
    with tarfile.open(tmp_path / "a.tar") as tar:
        ends = [member.offset_data + member.size for member in tar.getmembers()]
    content = (tmp_path / "a.tar").read_bytes()
    edits = data.draw(edit_lists(len(content)))
    (tmp_path / "a.tar").write_bytes(apply_edits(content, edits))
    items, tally = read_source(tmp_path, format="webdataset")
    # A sample ends only with the header of the next one.
    unharmed = sum(end + 1024 <= edits[0].offset for end in ends[1::2])
    assert document_texts(items)[:unharmed] == [picture.caption for picture in IMAGES[:unharmed]]
    assert len(items) >= 1
    assert tally.files == 1


def test_missing_pillow_is_one_line(tmp_path, monkeypatch):
    write_tar(tmp_path / "a.tar", tar_members(IMAGES))
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setattr(files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'mhmoe-ray\[pictures\]'$"):
        read_source(tmp_path, format="webdataset")
    # The captions alone need no decoder.
    assert len(read_source(tmp_path, format="webdataset", columns=["text"])[0]) == 12
