"""Places on an object store beside folders of this machine: the same methods give the same answers."""

import json

import pyarrow.fs
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from mhmoe_ray.errors import SpecError
from mhmoe_ray.runs import jsonl
from mhmoe_ray.runs.directory import create_run
from mhmoe_ray.runs.jsonl import Glimpse
from mhmoe_ray.storage import ObjectPath, copy_file, create_file, location, remove_tree, replace_file
from tests.specs import tiny_spec


@pytest.fixture(params=["here", "on S3"])
def place(request, tmp_path):
    if request.param == "here":
        return tmp_path
    query, _ = request.getfixturevalue("s3")
    return ObjectPath(f"s3://bucket/{tmp_path.name}?{query}")


def test_files_are_written_found_and_removed(place):
    assert not (place / "a").exists()
    replace_file(place / "a" / "one", b"1")
    replace_file(place / "a" / "one", b"11")
    with create_file(place / "a" / "two") as f:
        f.write(b"2" * (6 << 20))  # more than a part of an upload
    with pytest.raises(FileExistsError), create_file(place / "a" / "two"):
        pass
    copy_file(place / "a" / "one", place / "b" / "three")
    assert (place / "a").exists()
    assert (place / "a" / "one").is_file()
    assert not (place / "a").is_file()
    assert (place / "a" / "one").read_text() == "11"
    assert (place / "a" / "two").stat().st_size == 6 << 20
    with (place / "a" / "two").open("rb", buffering=0) as f:
        f.seek((6 << 20) - 3)
        into = bytearray(9)
        assert f.readinto(memoryview(into)) == 3
    assert sorted(p.name for p in place.iterdir()) == ["a", "b"]
    assert sorted(str(p) for p in place.glob("*/t*")) == sorted(map(str, (place / "a" / "two", place / "b" / "three")))
    assert [p.parent for p in place.glob("*/one")] == [place / "a"]
    assert not list((place / "nothing").glob("*"))
    (place / "b" / "three").unlink()
    (place / "b" / "three").unlink(missing_ok=True)
    remove_tree(place / "a")
    assert not (place / "a").exists()
    for missing in (lambda: (place / "a" / "one").read_bytes(), lambda: (place / "a" / "one").stat()):
        with pytest.raises(FileNotFoundError):
            missing()


def test_lines_come_back_in_order_and_a_tail_gives_each_once(place, monkeypatch):
    monkeypatch.setattr(jsonl, "SEGMENT_BYTES", 40)
    path = place / "lines.jsonl"
    tail = jsonl.Tail(path)
    assert (list(tail.new()), list(jsonl.read(path)), jsonl.modified(path)) == ([], [], 0)
    seen = []
    for i in range(12):
        jsonl.append(path, {"i": i}, at_once=i < 3)
        if i % 4 == 0:
            jsonl.flush(path)
        seen += tail.new()
    jsonl.flush(path)
    seen += tail.new()
    assert [line["i"] for line in seen] == list(range(12))
    assert list(jsonl.read(path)) == seen
    assert next(Glimpse(path).backwards()) == {"i": 11}
    assert jsonl.modified(path) > 0
    later = jsonl.Tail(path, from_now=True)
    jsonl.append(path, {"i": 12})
    assert list(later.new()) == [{"i": 12}]


def test_lines_of_an_object_store_are_asked_for_once(s3, tmp_path, monkeypatch):
    path = ObjectPath(f"s3://bucket/{tmp_path.name}/lines.jsonl?{s3[0]}")
    asked, read_bytes = [], ObjectPath.read_bytes
    monkeypatch.setattr(ObjectPath, "read_bytes", lambda self: (asked.append(self.name), read_bytes(self))[1])
    for i in range(3):
        jsonl.append(path, {"i": i})
    for count in (3, 3, 4):
        if count > 3:
            jsonl.append(path, {"i": 3})
        assert [line["i"] for line in jsonl.read(path)] == list(range(count))
    assert len(asked) == len(set(asked)) == 4


def test_a_place_is_its_uri(s3):
    query, _ = s3
    place = location(f"s3://bucket/runs/?{query}")
    assert str(place / "a" / "b") == f"s3://bucket/runs/a/b?{query}"
    assert ((place / "a").name, (place / "a").parent) == ("a", place)
    assert hash(place / "a") == hash(place / "a")
    assert (place / "a") != (place / "b")
    assert location(str(place)) == place.absolute()


def test_a_password_in_a_uri_is_refused_without_showing_it():
    with pytest.raises(SpecError, match=r"path s3://\.\.\.@bucket: it holds a password") as e:
        location("s3://KEY:SECRET@bucket/x")
    assert "SECRET" not in str(e.value)
    for fine in ("gs://anonymous@bucket/x", "s3://bucket/a:b@c"):
        assert str(location(fine)) == fine


def test_a_scheme_that_is_not_known_is_said():
    with pytest.raises(SpecError, match="ftp:// is not known; use a local path, s3:// or gs://"):
        location("ftp://host/x")


def test_a_torn_segment_is_no_line(s3):
    query, _ = s3
    path = ObjectPath(f"s3://bucket/torn?{query}")
    (path / "1.jsonl").write_bytes(json.dumps({"a": 1}).encode() + b'\n{"a": 2')
    assert list(jsonl.read(path)) == [{"a": 1}]


def test_an_entry_alone_adds_a_store_for_runs_and_for_raw_files(monkeypatch):
    from mhmoe_ray.data.sources.storage import Storage
    from mhmoe_ray.storage import STORES

    memory = MemoryFileSystem()
    monkeypatch.setattr(memory, "store", {})
    system = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(memory))
    monkeypatch.setitem(STORES, "toy", lambda scheme, bucket, query: (system, f"/{bucket}"))
    run = create_run(tiny_spec().model_copy(update={"storage": location("toy://bucket/runs")}))
    assert isinstance(run.path, ObjectPath)
    assert run.spec().name == "tiny"
    assert memory.exists(f"/bucket/runs/{run.id}/spec.yaml")
    memory.pipe("/bucket/raw/a.jsonl", b"{}\n")
    [listed] = Storage("toy://bucket/raw/*.jsonl").files().files
    assert Storage("toy://bucket/raw").open(listed.path).read() == b"{}\n"
