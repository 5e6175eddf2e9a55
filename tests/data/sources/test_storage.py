"""Files that change while they are read, and object stores: a real server that speaks S3, on loopback."""

import re
from pathlib import Path

import pytest
from pyarrow import fs

from mhmoe_ray.data.sources import Reading, Reason, find_files, storage
from mhmoe_ray.data.sources.storage import CHUNK
from mhmoe_ray.errors import DataError
from tests.data.sources.read import bad, data_spec, read, texts
from tests.data.sources.test_columns import write_dataset
from tests.data.sources.v2_files import write_v2
from tests.data.texts import documents, write_corpus, write_documents

LONG = documents("long", 9000, words=90)


def test_a_file_that_shrinks_while_it_is_read_gives_what_was_there(tmp_path):
    path = tmp_path / "f.jsonl"
    write_documents(path, LONG)
    assert path.stat().st_size > 3 * CHUNK
    spec = data_spec(tmp_path)
    [file] = find_files(spec)
    reading = Reading(file, spec)
    items = iter(reading)
    read_so_far = [next(items) for _ in range(10)]
    with path.open("r+b") as f:
        f.truncate(2 * CHUNK + 5)
    everything = read_so_far + list(items)
    there = path.read_bytes().count(b"\n")
    assert texts(everything) == LONG[:there]
    assert bad(everything) == [(there + 1, Reason.LOST)]
    assert f"it ended after {2 * CHUNK + 5:,} bytes, and had {file.size:,} when it was listed" in everything[-1].detail
    assert reading.tally.damaged == 1


def test_a_file_that_vanishes_after_it_was_listed_is_told(tmp_path):
    write_documents(tmp_path / "a.jsonl", LONG[:3])
    write_documents(tmp_path / "b.jsonl", LONG[3:6])
    spec = data_spec(tmp_path)
    first, second = find_files(spec)
    (tmp_path / "a.jsonl").unlink()
    assert bad(list(Reading(first, spec))) == [(1, Reason.LOST)]
    items = []
    for item in Reading(second, spec):  # while it is read: an open file stays
        (tmp_path / "b.jsonl").unlink(missing_ok=True)
        items.append(item)
    assert texts(items) == LONG[3:6]


def upload(system: fs.FileSystem, folder: Path, name: str) -> None:
    fs.copy_files(str(folder), f"bucket/{name}", destination_filesystem=system)


def test_a_source_on_s3_reads_as_the_same_one_here(tmp_path, s3):
    query, system = s3
    write_corpus(tmp_path / "mixed" / "jsonl")
    write_dataset(tmp_path / "set" / "de", LONG[:80])
    write_v2(tmp_path / "v2", "2023-06/0000/en_head", [{"text": "a"}, {"text": "b", "duplicate": True}])
    filters = {"gopher": True, "deduplicate": True, "near_duplicates": 0.7}
    for name, keys in {"mixed": {}, "set": {}, "v2": {"filters": filters}}.items():
        upload(system, tmp_path / name, name)
        here, here_tally = read(tmp_path / name, **keys)
        there, there_tally = read(f"s3://bucket/{name}?{query}", **keys)
        assert there == here
        assert here_tally.documents > 0
        assert there_tally == here_tally
    files = find_files(data_spec(f"s3://bucket/mixed/jsonl/*/t*.jsonl.*?{query}"))
    assert [(f.domain, f.path) for f in files] == [
        ("web/a", "s3://bucket/mixed/jsonl/a/two.jsonl.zst"),
        ("web/b", "s3://bucket/mixed/jsonl/b/three.jsonl.gz"),
    ]


def test_an_object_that_vanishes_in_mid_read_is_told_with_what_was_read(tmp_path, s3, monkeypatch):
    monkeypatch.setattr(storage, "OBJECT_CHUNK", CHUNK)
    query, system = s3
    write_documents(tmp_path / "f.jsonl", LONG)
    upload(system, tmp_path, "gone")
    spec = data_spec(f"s3://bucket/gone?{query}")
    [file] = find_files(spec)
    items = iter(Reading(file, spec))
    first = next(items)
    system.delete_file("bucket/gone/f.jsonl")
    everything = [first, *items]
    kept = len(texts(everything))
    assert 0 < kept < len(LONG)
    assert texts(everything) == LONG[:kept]
    assert bad(everything) == [(kept + 1, Reason.LOST)]
    assert bad(list(Reading(file, spec))) == [(1, Reason.LOST)]


def test_what_is_not_on_s3_is_one_line(s3):
    query, _ = s3
    with pytest.raises(DataError, match="there is no folder s3://bucket/nothing;"):
        find_files(data_spec(f"s3://bucket/nothing?{query}"))
    with pytest.raises(DataError, match="there is no folder s3://nowhere/f;"):
        find_files(data_spec(f"s3://nowhere/f?{query}"))
    with pytest.raises(DataError, match=r"path s3://bucket/f\?nonsense=1: "):
        find_files(data_spec("s3://bucket/f?nonsense=1"))
    for empty in ("bucket//data", "bucket/a//x/*.jsonl"):
        with pytest.raises(DataError, match=f"^source web: s3://{re.escape(empty)}.*cannot be listed: Empty path"):
            find_files(data_spec(f"s3://{empty}?{query}"))
