"""Tests of copies of prepared folders to an S3 server and back."""

from secrets import token_hex

import numpy as np
import pytest

from mhmoe_ray.data.shards.cache import CachePlan
from mhmoe_ray.data.shards.columns import IMAGE, TOKENS
from mhmoe_ray.data.shards.copy import copy_folder
from mhmoe_ray.data.shards.files import to_batch, write_shard
from mhmoe_ray.data.shards.manifest import MANIFEST_FILE, require_data_manifest
from mhmoe_ray.data.shards.reader import ShardReader
from mhmoe_ray.errors import DataError
from mhmoe_ray.storage import ObjectPath, describe_file
from tests.data.shards.manifests import make_manifest


@pytest.fixture
def folder(tmp_path):
    """Return a prepared folder on the local disk."""
    folder = tmp_path / "prepared"
    rows = np.arange(90 * 17).reshape(90, 17).astype("<u2")
    files = ["train/book/00000.arrow", "train/book/00001.arrow", "validation/00000.arrow"]
    shards = [
        write_shard(folder, file, to_batch({TOKENS: part}))
        for file, part in zip(files, np.split(rows, [40, 80]), strict=True)
    ]
    (folder / "tokenizer.json").write_text("{}")
    (folder / "quarantine.jsonl").write_text("")
    manifest = make_manifest({"book": 80})
    manifest.domains["book"].shards, manifest.validation = shards[:2], shards[2:]
    manifest.tokenizer_sha256 = describe_file(folder / "tokenizer.json").sha256
    (folder / MANIFEST_FILE).write_text(manifest.model_dump_json())
    return folder


@pytest.fixture
def target(s3) -> ObjectPath:
    return ObjectPath(f"s3://bucket/{token_hex(3)}?{s3[0]}")


def local_files(folder):
    """Return the contents of a folder's files by their relative paths."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_copy_to_an_object_store_and_back_has_the_same_files(folder, target, tmp_path):
    *_, progress = copy_folder(folder, target)
    assert progress.files == progress.total
    assert progress.copied_bytes == sum(map(len, local_files(folder).values()))
    *_, progress = copy_folder(folder, target)
    assert progress.copied_bytes == 0
    list(copy_folder(target, tmp_path / "back"))
    assert local_files(tmp_path / "back") == local_files(folder)


def test_single_rows_of_a_copy_can_be_read(folder, target, tmp_path):
    list(copy_folder(folder, target))
    manifest = require_data_manifest(target)
    plan = CachePlan(tmp_path / "cache", 0, False)
    for shards in (domain.shards for domain in manifest.domains.values()):
        local_reader = ShardReader(folder, shards, manifest.token_bytes)
        numbers = np.arange(len(local_reader))[::-2]
        remote_rows = ShardReader(target, shards, manifest.token_bytes, plan).read(numbers)
        assert np.array_equal(remote_rows, local_reader.read(numbers))


def test_a_copy_that_was_interrupted_is_continued(folder, target):
    next(iter(copy_folder(folder, target)))
    assert not (target / MANIFEST_FILE).exists()
    list(copy_folder(folder, target))
    assert all((target / name).read_bytes() == content for name, content in local_files(folder).items())


def test_a_damaged_file_of_a_copy_is_replaced_and_one_of_the_source_is_named(folder, target):
    list(copy_folder(folder, target))
    file = require_data_manifest(folder).validation[0].file
    (target / file).write_bytes(b"damaged")
    list(copy_folder(folder, target))
    assert (target / file).read_bytes() == (folder / file).read_bytes()
    (target / file).unlink()
    (folder / file).write_bytes(b"damaged")
    with pytest.raises(DataError, match=f"{file}: its content is not what was written"):
        list(copy_folder(folder, target))


def test_shards_of_images_are_copied_once(folder, target):
    manifest = require_data_manifest(folder)
    batch = to_batch({TOKENS: np.zeros((2, 17), "<u2"), IMAGE: [b"one", b"two"]})
    manifest.validation = [write_shard(folder, "validation/00000.arrow", batch)]
    (folder / MANIFEST_FILE).write_text(manifest.model_dump_json())
    list(copy_folder(folder, target))
    *_, progress = copy_folder(folder, target)
    assert progress.copied_bytes == 0


def test_a_folder_with_other_data_is_refused(folder, target):
    (target / MANIFEST_FILE).write_bytes(b"{}")
    with pytest.raises(DataError, match="it is another data set; name another folder"):
        list(copy_folder(folder, target))
