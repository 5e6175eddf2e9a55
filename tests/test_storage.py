"""Tests of storage locations: paths on an object store have the methods of local paths, with the same results."""

import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow.fs
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from mhmoe_ray.data.shards.manifest import read_data_manifest
from mhmoe_ray.data.sources import find_files
from mhmoe_ray.errors import DataError, MhmoeError, SpecError, StorageError
from mhmoe_ray.runs import jsonl
from mhmoe_ray.runs.directory import create_run, list_runs
from mhmoe_ray.runs.jsonl import JsonlSnapshot
from mhmoe_ray.spec import DataSpec, SourceSpec
from mhmoe_ray.storage import (
    ObjectPath,
    copy_file,
    create_file,
    explain_error,
    location,
    remove_tree,
    replace_file,
    retry_reads,
)
from tests.support.s3 import CREDENTIALS
from tests.support.specs import tiny_spec


@pytest.fixture(params=["here", "on S3"])
def root(request, tmp_path):
    """Return an empty folder: once a local one, and once one on S3."""
    if request.param == "here":
        return tmp_path
    query, _ = request.getfixturevalue("s3")
    return ObjectPath(f"s3://bucket/{tmp_path.name}?{query}")


def test_files_are_written_found_and_removed(root):
    assert not (root / "a").exists()
    replace_file(root / "a" / "one", b"1")
    replace_file(root / "a" / "one", b"11")
    with create_file(root / "a" / "two") as f:
        f.write(b"2" * (6 << 20))  # so much that an upload has several parts
    with pytest.raises(FileExistsError), create_file(root / "a" / "two"):
        pass
    copy_file(root / "a" / "one", root / "b" / "three")
    assert (root / "a").exists()
    assert (root / "a" / "one").is_file()
    assert not (root / "a").is_file()
    assert (root / "a" / "one").read_text() == "11"
    assert (root / "a" / "two").stat().st_size == 6 << 20
    with (root / "a" / "two").open("rb", buffering=0) as f:
        f.seek((6 << 20) - 3)
        buffer = bytearray(9)
        assert f.readinto(memoryview(buffer)) == 3
    assert sorted(p.name for p in root.iterdir()) == ["a", "b"]
    assert sorted(str(p) for p in root.glob("*/t*")) == sorted(map(str, (root / "a" / "two", root / "b" / "three")))
    assert [p.parent for p in root.glob("*/one")] == [root / "a"]
    assert not list((root / "nothing").glob("*"))
    (root / "b" / "three").unlink()
    (root / "b" / "three").unlink(missing_ok=True)
    remove_tree(root / "a")
    assert not (root / "a").exists()
    for read_missing_file in (lambda: (root / "a" / "one").read_bytes(), lambda: (root / "a" / "one").stat()):
        with pytest.raises(FileNotFoundError):
            read_missing_file()


def test_jsonl_keeps_the_order_and_a_tail_yields_each_line_once(root, monkeypatch):
    monkeypatch.setattr(jsonl, "SEGMENT_BYTES", 40)
    path = root / "lines.jsonl"
    tail = jsonl.Tail(path)
    assert (list(tail.new_lines()), list(jsonl.read(path)), jsonl.modification_time(path)) == ([], [], 0)
    tail_lines = []
    for i in range(12):
        jsonl.append(path, {"i": i}, immediate=i < 3)
        if i % 4 == 0:
            jsonl.flush(path)
        tail_lines += tail.new_lines()
    jsonl.flush(path)
    tail_lines += tail.new_lines()
    assert [line["i"] for line in tail_lines] == list(range(12))
    assert list(jsonl.read(path)) == tail_lines
    assert next(JsonlSnapshot(path).lines_backwards()) == {"i": 11}
    assert jsonl.modification_time(path) > 0
    later_tail = jsonl.Tail(path, from_now=True)
    jsonl.append(path, {"i": 12})
    assert list(later_tail.new_lines()) == [{"i": 12}]


def test_segments_on_an_object_store_are_downloaded_once(s3, tmp_path, monkeypatch):
    path = ObjectPath(f"s3://bucket/{tmp_path.name}/lines.jsonl?{s3[0]}")
    requested_names, read_bytes = [], ObjectPath.read_bytes
    monkeypatch.setattr(ObjectPath, "read_bytes", lambda self: (requested_names.append(self.name), read_bytes(self))[1])
    for i in range(3):
        jsonl.append(path, {"i": i})
    for count in (3, 3, 4):
        if count > 3:
            jsonl.append(path, {"i": 3})
        assert [line["i"] for line in jsonl.read(path)] == list(range(count))
    assert len(requested_names) == len(set(requested_names)) == 4


def test_object_paths_are_written_and_compared_as_uris(s3):
    query, _ = s3
    root = location(f"s3://bucket/runs/?{query}")
    assert str(root / "a" / "b") == f"s3://bucket/runs/a/b?{query}"
    assert ((root / "a").name, (root / "a").parent) == ("a", root)
    assert hash(root / "a") == hash(root / "a")
    assert (root / "a") != (root / "b")
    assert location(str(root)) == root.absolute()


def test_a_password_in_a_uri_is_refused_without_showing_it():
    with pytest.raises(SpecError, match=r"path s3://\.\.\.@bucket: it holds a password") as e:
        location("s3://KEY:SECRET@bucket/x")
    assert "SECRET" not in str(e.value)
    for allowed_uri in ("gs://anonymous@bucket/x", "s3://bucket/a:b@c"):
        assert str(location(allowed_uri)) == allowed_uri


def test_an_unknown_scheme_is_refused():
    with pytest.raises(SpecError, match="ftp:// is not known; use a local path, s3:// or gs://"):
        location("ftp://host/x")


def test_a_torn_line_is_ignored(s3):
    query, _ = s3
    path = ObjectPath(f"s3://bucket/torn?{query}")
    (path / "1.jsonl").write_bytes(json.dumps({"a": 1}).encode() + b'\n{"a": 2')
    assert list(jsonl.read(path)) == [{"a": 1}]


def test_one_entry_adds_a_store_for_runs_and_raw_files(monkeypatch):
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
    [listed_file] = Storage("toy://bucket/raw/*.jsonl").list_files().files
    assert Storage("toy://bucket/raw").open(listed_file.path).read() == b"{}\n"


def test_files_and_their_names_are_on_the_disk_before_a_write_ends(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(str(Path(f"/proc/self/fd/{fd}").readlink())) or fsync(fd))
    monkeypatch.setattr(Path, "replace", lambda self, target: calls.append("replace") or replace(self, target))
    replace_file(tmp_path / "a" / "b" / "file", b"content")
    folders = [str(tmp_path / "a"), str(tmp_path)]
    assert calls[:2] == folders
    assert calls[2].startswith(str(tmp_path / "a" / "b" / ".file."))
    assert calls[3:] == ["replace", str(tmp_path / "a" / "b")]
    calls.clear()
    with create_file(tmp_path / "c" / "file") as file:
        file.write(b"content")
    assert calls == [str(tmp_path), str(tmp_path / "c" / "file"), str(tmp_path / "c")]


REFUSALS = {
    "AccessDenied": (403, "does not permit it to these credentials"),
    "InvalidAccessKeyId": (403, "does not know the access key"),
    "SignatureDoesNotMatch": (403, "secret key does not belong to the access key"),
    "ExpiredToken": (400, "token of the credentials has expired"),
    "InvalidToken": (400, "does not accept the token of the credentials"),
    "AuthorizationHeaderMalformed": (400, "in (region eu-west-1, not us-east-1|another region)"),
    "PermanentRedirect": (301, "in (region eu-west-1, not us-east-1|another region)"),
}
"""HTTP status of each answer by which S3 refuses requests, and a pattern of the reason that users see."""


@pytest.fixture
def refusing_store(monkeypatch):
    """Serve a store that refuses all requests; yield a function that sets the answer and returns a URI."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def refuse(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = f"<Error><Code>{code}</Code><Message>m</Message></Error>".encode()
            self.send_response(REFUSALS[code][0])
            # S3 names the region of the bucket in all its answers.
            self.send_header("x-amz-bucket-region", "eu-west-1" if "region" in REFUSALS[code][1] else "us-east-1")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else body)

        do_GET = do_HEAD = do_PUT = do_POST = refuse

        def log_message(self, *_):
            pass

    def set_answer(answer):
        nonlocal code
        code = answer
        return f"s3://bucket/folder?region=us-east-1&scheme=http&endpoint_override=127.0.0.1:{server.server_port}"

    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    code = ""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield set_answer
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("answer", REFUSALS)
def test_a_refusal_of_the_store_is_one_short_line(refusing_store, answer):
    folder, reason = ObjectPath(refusing_store(answer)), REFUSALS[answer][1]
    for use, error_type in (
        (lambda: read_data_manifest(folder), DataError),
        (lambda: list_runs(folder), StorageError),
        (lambda: find_files(DataSpec(sources={"web": SourceSpec(path=str(folder))}, prepared="p")), DataError),
        (lambda: create_run(tiny_spec(storage=str(folder))), SpecError),
    ):
        with pytest.raises(error_type, match=reason) as error:
            use()
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 300
    for read in (folder.read_bytes, folder.open):
        with pytest.raises(OSError, match="AWS Error") as refusal:
            retry_reads(read)
        assert re.search(reason, explain_error(refusal.value, "")[0])


def test_a_missing_bucket_is_named_before_anything_starts(s3):
    for use in (lambda p: create_run(tiny_spec(storage=str(p))), read_data_manifest):
        with pytest.raises(MhmoeError, match="there is no such bucket") as error:
            use(ObjectPath(f"s3://elsewhere/folder?{s3[0]}"))
        assert "create it, or correct its name" in str(error.value)
