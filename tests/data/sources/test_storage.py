"""Tests of files that change during reading, and of object storage on a local S3 server."""

import re
from pathlib import Path

import pytest
from pyarrow import fs

from mhmoe_ray.data.sources import FileReader, Reason, find_files, storage, version_hash
from mhmoe_ray.data.sources.storage import CHUNK_BYTES, Storage
from mhmoe_ray.errors import DataError
from tests.data.sources.read import bad_lines, data_spec, document_texts, read_source
from tests.data.sources.tables import write_dataset
from tests.data.sources.v2_files import write_v2_files
from tests.data.texts import make_documents, write_corpus, write_documents

LONG_TEXTS = make_documents("long", 9000, words=90)


def test_reader_yields_the_rest_of_a_shrinking_file(tmp_path):
    path = tmp_path / "f.jsonl"
    write_documents(path, LONG_TEXTS)
    assert path.stat().st_size > 3 * CHUNK_BYTES
    spec = data_spec(tmp_path)
    [file] = find_files(spec)
    file_reader = FileReader(file, spec)
    items = iter(file_reader)
    read_so_far = [next(items) for _ in range(10)]
    with path.open("r+b") as f:
        f.truncate(2 * CHUNK_BYTES + 5)
    all_items = read_so_far + list(items)
    line_count = path.read_bytes().count(b"\n")
    assert document_texts(all_items) == LONG_TEXTS[:line_count]
    assert bad_lines(all_items) == [(line_count + 1, Reason.PART_LOST)]
    assert (
        f"it ended after {2 * CHUNK_BYTES + 5:,} bytes, but had {file.size:,} when it was listed"
        in all_items[-1].detail
    )
    assert file_reader.tally.damaged == 1


def test_reader_reports_a_vanished_file(tmp_path):
    write_documents(tmp_path / "a.jsonl", LONG_TEXTS[:3])
    write_documents(tmp_path / "b.jsonl", LONG_TEXTS[3:6])
    spec = data_spec(tmp_path)
    first_file, second_file = find_files(spec)
    (tmp_path / "a.jsonl").unlink()
    assert bad_lines(list(FileReader(first_file, spec))) == [(1, Reason.PART_LOST)]
    items = []
    # The file is removed while it is read. Because it is open, it stays readable.
    for item in FileReader(second_file, spec):
        (tmp_path / "b.jsonl").unlink(missing_ok=True)
        items.append(item)
    assert document_texts(items) == LONG_TEXTS[3:6]


def upload_folder(file_system: fs.FileSystem, folder: Path, name: str) -> None:
    fs.copy_files(str(folder), f"bucket/{name}", destination_filesystem=file_system)


def test_s3_source_reads_like_a_local_source(tmp_path, s3):
    query, file_system = s3
    write_corpus(tmp_path / "mixed" / "jsonl")
    write_dataset(tmp_path / "set" / "de", LONG_TEXTS[:80])
    write_v2_files(tmp_path / "v2", "2023-06/0000/en_head", [{"text": "a"}, {"text": "b", "duplicate": True}])
    filters = {"gopher": True, "deduplicate": True, "near_duplicates": 0.7}
    for name, keys in {"mixed": {}, "set": {}, "v2": {"filters": filters}}.items():
        upload_folder(file_system, tmp_path / name, name)
        local_items, local_tally = read_source(tmp_path / name, **keys)
        remote_items, remote_tally = read_source(f"s3://bucket/{name}?{query}", **keys)
        assert remote_items == local_items
        assert local_tally.documents > 0
        assert remote_tally == local_tally
    files = find_files(data_spec(f"s3://bucket/mixed/jsonl/*/t*.jsonl.*?{query}"))
    assert [(f.domain, f.path) for f in files] == [
        ("web/a", "s3://bucket/mixed/jsonl/a/two.jsonl.zst"),
        ("web/b", "s3://bucket/mixed/jsonl/b/three.jsonl.gz"),
    ]


def test_a_new_version_of_an_object_changes_the_hash_of_its_source(tmp_path, s3):
    query, file_system = s3
    write_documents(tmp_path / "f.jsonl", LONG_TEXTS)
    upload_folder(file_system, tmp_path, "versions")
    for path in ("versions", "versions/f.jsonl", "versions/*.jsonl"):
        spec = data_spec(f"s3://bucket/{path}?{query}")
        files = find_files(spec)
        [time] = Storage(spec.sources["web"].path).modification_times([file.path for file in files])
        assert time == file_system.get_file_info("bucket/versions/f.jsonl").mtime_ns
        assert version_hash(spec, files) == version_hash(spec, find_files(spec))
    first_hash = version_hash(spec, files)
    write_documents(tmp_path / "f.jsonl", LONG_TEXTS[1:])
    upload_folder(file_system, tmp_path, "versions")
    assert version_hash(spec, find_files(spec)) != first_hash


def test_reader_reports_a_vanished_object(tmp_path, s3, monkeypatch):
    monkeypatch.setattr(storage, "OBJECT_CHUNK_BYTES", CHUNK_BYTES)
    query, file_system = s3
    write_documents(tmp_path / "f.jsonl", LONG_TEXTS)
    upload_folder(file_system, tmp_path, "gone")
    spec = data_spec(f"s3://bucket/gone?{query}")
    [file] = find_files(spec)
    items = iter(FileReader(file, spec))
    first_item = next(items)
    file_system.delete_file("bucket/gone/f.jsonl")
    all_items = [first_item, *items]
    document_count = len(document_texts(all_items))
    assert 0 < document_count < len(LONG_TEXTS)
    assert document_texts(all_items) == LONG_TEXTS[:document_count]
    assert bad_lines(all_items) == [(document_count + 1, Reason.PART_LOST)]
    assert bad_lines(list(FileReader(file, spec))) == [(1, Reason.PART_LOST)]


def test_find_files_reports_wrong_s3_paths(s3):
    query, _ = s3
    with pytest.raises(DataError, match="there is no file or folder s3://bucket/nothing;"):
        find_files(data_spec(f"s3://bucket/nothing?{query}"))
    with pytest.raises(DataError, match="there is no file or folder s3://nowhere/f;"):
        find_files(data_spec(f"s3://nowhere/f?{query}"))
    with pytest.raises(DataError, match=r"path s3://bucket/f\?nonsense=1: "):
        find_files(data_spec("s3://bucket/f?nonsense=1"))
    for path in ("bucket//data", "bucket/a//x/*.jsonl"):
        with pytest.raises(DataError, match=f"^source web: s3://{re.escape(path)}.*cannot be listed: Empty path"):
            find_files(data_spec(f"s3://{path}?{query}"))
