"""Tests of shards on a real S3 server: in the cache of a node, by ranges, damaged, and with disturbed transfers."""

import json
import os
import resource
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from secrets import token_hex

import numpy as np
import pytest

from mhmoe_ray.data.shards.cache import CachePlan, ShardCache
from mhmoe_ray.data.shards.columns import TOKENS, columns_of
from mhmoe_ray.data.shards.files import to_batch, write_shard
from mhmoe_ray.data.shards.manifest import Domain
from mhmoe_ray.data.shards.ranges import checks_file
from mhmoe_ray.data.shards.reader import ShardReader
from mhmoe_ray.data.shards.verify import verify_shards
from mhmoe_ray.errors import DataError
from mhmoe_ray.spec.cluster import ShardCacheSpec
from mhmoe_ray.storage import ObjectPath
from tests.data.shards.manifests import make_manifest
from tests.support.proxy import Fault, FaultyProxy

ROWS = np.random.default_rng(1).integers(0, 60_000, (90, 1025)).astype("<u2")
PARTS = np.split(ROWS, [40, 41])


@pytest.fixture
def folder(s3) -> ObjectPath:
    return ObjectPath(f"s3://bucket/{token_hex(3)}/prepared?{s3[0]}")


@pytest.fixture
def shards(folder):
    return [write_shard(folder, f"train/web/{i}.arrow", to_batch(columns_of(part))) for i, part in enumerate(PARTS)]


@pytest.fixture
def plans(tmp_path):
    """Plans with room for all shards, and for none."""
    return {"whole": CachePlan(tmp_path / "cache", 10**6, True), "ranges": CachePlan(tmp_path / "cache", 0, False)}


def recorded_requests(query: str, action: str) -> str:
    """Start or read the record of all requests that the S3 server keeps."""
    url = f"http://127.0.0.1:{query.rpartition(':')[2]}/moto-api/recorder/{action}"
    method = "GET" if action == "download-recording" else "POST"
    with urllib.request.urlopen(urllib.request.Request(url, method=method)) as response:
        return response.read().decode()


def read_object_requests(query: str, folder: ObjectPath) -> list[dict]:
    """Return the requests since the start of the record that read content below a folder."""
    lines = recorded_requests(query, "download-recording").splitlines()
    requests = [json.loads(line) for line in lines if line]
    return [
        r for r in requests if r["method"] == "GET" and folder.parent.name in r["url"] and "list-type" not in r["url"]
    ]


@pytest.mark.parametrize("kind", ["whole", "ranges", None])
def test_samples_of_an_object_store_are_those_of_a_local_folder(folder, shards, plans, kind):
    numbers = np.random.default_rng(0).integers(0, 90, 200)
    reader = ShardReader(folder, shards, 2, plans.get(kind))
    assert np.array_equal(reader.read(numbers), ROWS[numbers])
    assert reader.read(np.array([], np.int64)).shape == (0, 1025)


def test_only_the_rows_that_are_read_are_fetched(s3, folder, shards, plans):
    reader = ShardReader(folder, shards, 2, plans["ranges"])
    reader.read(np.array([0, 40, 41]))  # opens the shards
    recorded_requests(s3[0], "reset-recording")
    recorded_requests(s3[0], "start-recording")
    assert np.array_equal(reader.read(np.array([7, 8, 9, 8, 60])), ROWS[[7, 8, 9, 8, 60]])
    recorded_requests(s3[0], "stop-recording")
    ranges = [request["headers"]["Range"] for request in read_object_requests(s3[0], folder)]
    starts_and_ends = [map(int, text.removeprefix("bytes=").split("-")) for text in ranges]
    assert sorted(end - start + 1 for start, end in starts_and_ends) == [2050, 3 * 2050]


def test_processes_of_a_node_fetch_a_shard_once(s3, folder, shards, plans):
    recorded_requests(s3[0], "reset-recording")
    recorded_requests(s3[0], "start-recording")
    path, limit, _ = plans["whole"]
    files = []

    def open_shards() -> None:
        files.extend(ShardCache(path, limit).open(folder / shard.file, shard.sha256) for shard in shards)

    threads = [threading.Thread(target=open_shards) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    recorded_requests(s3[0], "stop-recording")
    assert len(files) == 18
    for file in files:
        with file:
            assert file.read() == (path / file.name).read_bytes()
    assert len(read_object_requests(s3[0], folder)) == 3


WATCH = """
import os, select, sys
def folder_size():
    size = 0
    for entry in os.scandir(sys.argv[1]):
        try:
            size += entry.stat().st_size
        except FileNotFoundError:
            pass
    return size
print(folder_size(), flush=True)
sizes = []
while not select.select([sys.stdin], [], [], 0.001)[0]:
    sizes.append(folder_size())
print(max(sizes))
"""
"""Program that prints the size of a folder, and at the end of its input the largest size that it has seen since."""


def test_a_cache_never_passes_its_bound_and_keeps_shards_that_are_open(folder, tmp_path):
    shards = [write_shard(folder, f"{i}.arrow", to_batch({TOKENS: ROWS[i : i + 20]})) for i in range(6)]
    cache, path = ShardCache(tmp_path, 100_000), tmp_path
    watcher = subprocess.Popen([sys.executable, "-c", WATCH, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert watcher.stdout.readline() == b"0\n"
    sources = [folder / shard.file for shard in shards]
    # Each shard has 41 kB, so the cache has room for two.
    first_file, second_file = (cache.open(sources[i], shards[i].sha256) for i in range(2))
    assert cache.open(sources[2], shards[2].sha256) is None
    first_file.close()
    third_file = cache.open(sources[2], shards[2].sha256)
    assert {file.name for file in path.glob("*.arrow")} == {f"{shards[i].sha256}.arrow" for i in (1, 2)}
    second_file.close()
    third_file.close()
    for source, shard in zip(sources, shards, strict=True):
        cache.open(source, shard.sha256).close()
    largest_size = int(watcher.communicate()[0])
    assert watcher.returncode == 0
    assert 80_000 < largest_size <= 100_000


def test_a_cache_refuses_folders_of_other_programs_and_users(tmp_path, monkeypatch):
    (tmp_path / "thesis.arrow").write_bytes(b"1")
    with pytest.raises(DataError, match=r"holds thesis\.arrow, which is no shard"):
        ShardCache(tmp_path, 10**6)
    assert (tmp_path / "thesis.arrow").exists()
    user_id = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user_id + 1)
    with pytest.raises(DataError, match="belongs to another user"):
        ShardCache(tmp_path, 10**6)


def test_a_shard_that_a_killed_process_began_to_fetch_is_fetched_again(folder, shards, plans):
    path, limit, _ = plans["whole"]
    cache = ShardCache(path, limit)
    (path / f"{shards[0].sha256}.partial").write_bytes(b"\1" * 200_000)
    (path / f"{shards[2].sha256}.partial").write_bytes(b"\1" * 900_000)
    with cache.open(folder / shards[0].file, shards[0].sha256) as file:
        assert file.read() == (folder / shards[0].file).read_bytes()


@pytest.mark.parametrize("kind", ["whole", "ranges"])
def test_an_object_that_was_replaced_is_named(folder, shards, plans, kind):
    path = folder / shards[2].file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    reader = ShardReader(folder, shards, 2, plans[kind])
    assert np.array_equal(reader.read(np.arange(41)), ROWS[:41])
    with pytest.raises(DataError, match=r"train/web/2\.arrow.*: it was replaced or damaged"):
        reader.read(np.arange(90))


def test_a_truncated_object_is_named(folder, shards, plans):
    path = folder / shards[2].file
    path.write_bytes(path.read_bytes()[:5000])
    for plan in plans.values():
        with pytest.raises(DataError, match=r"train/web/2\.arrow.*: it was replaced or damaged"):
            ShardReader(folder, shards, 2, plan).read(np.arange(41, 90))


@pytest.mark.parametrize("kind", ["whole", "ranges"])
def test_disturbed_transfers_give_the_same_samples(s3, folder, shards, plans, kind):
    proxy = FaultyProxy(int(s3[0].rpartition(":")[2]))
    query = f"{s3[0].rpartition(':')[0]}:{proxy.port}"
    disturbed_folder = ObjectPath(f"{str(folder).partition('?')[0]}?{query}")
    reader = ShardReader(disturbed_folder, shards, 2, plans[kind])
    proxy.disturb(*(Fault(fault, "GET", f"/{i}.arrow ") for fault in ("reset", "cut", "flip") for i in (0, 2)))
    for _ in range(4):
        assert np.array_equal(reader.read(np.arange(90)), ROWS)
        if kind == "whole":
            break
    assert proxy.pending_faults == []


@contextmanager
def suppress_damage() -> Iterator[None]:
    """Suppress the error that names a damaged object."""
    try:
        yield
    except DataError as e:
        if "it was replaced or damaged" not in str(e):
            raise


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["whole", "ranges"])
def test_a_hundred_random_faults_of_reads_change_no_sample(s3, folder, shards, plans, kind, tmp_path):
    """Each read returns the right samples or names a damaged object, and readers of one shard do not disturb others."""
    rng = np.random.default_rng(59)
    for number in range(10):
        # A process keeps open shards by their URI, so the shards of a new proxy are opened anew.
        proxy = FaultyProxy(int(s3[0].rpartition(":")[2]))
        query = f"{s3[0].rpartition(':')[0]}:{proxy.port}"
        disturbed_folder = ObjectPath(f"{str(folder).partition('?')[0]}?{query}")
        reader = ShardReader(disturbed_folder, shards, 2, plans[kind]._replace(path=tmp_path / f"{number}"))
        for fault_kind in rng.choice(["reset", "cut", "flip", "stall", "500", "503"], 10):
            has_status = fault_kind.isdigit()
            method = "HEAD" if has_status and rng.random() < 0.3 else "GET"
            proxy.disturb(Fault(str(fault_kind), method, "" if has_status else f"/{rng.choice([0, 2])}.arrow "))
        is_right = False
        while not is_right or (kind == "ranges" and proxy.pending_faults):
            # Several flips in a row are taken for damage of the object.
            with suppress_damage():
                assert np.array_equal(reader.read(np.arange(90)), ROWS)
                is_right = True


def test_verification_finds_missing_objects_and_content_without_checks(folder, shards, tmp_path):
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_bytes(b"{}")
    manifest = make_manifest({"web": 90})
    domain = Domain.model_validate(manifest.domains["web"].model_dump() | {"shards": shards})
    files = {"tokenizer_sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"}
    manifest = manifest.model_copy(update={"domains": {"web": domain}, "validation": [], **files})
    for size_gb in (0, 1):
        verify_shards(folder, manifest, ShardCacheSpec(size_gb=size_gb))
    path = folder / shards[2].file
    content = path.read_bytes()
    path.write_bytes(content[::-1])
    # The damage would be found when the rows arrive.
    verify_shards(folder, manifest, ShardCacheSpec(size_gb=0))
    checks_file(path).unlink()
    with pytest.raises(DataError, match=r"2\.arrow.*: its content is not what was written"):
        verify_shards(folder, manifest, ShardCacheSpec(size_gb=0))
    verify_shards(folder, manifest, ShardCacheSpec(size_gb=1))
    path.write_bytes(content)
    # A shard that was verified as a whole can be read row by row.
    verify_shards(folder, manifest, ShardCacheSpec(size_gb=0))
    no_room = CachePlan(tmp_path / "cache", 0, False)
    assert np.array_equal(ShardReader(folder, shards, 2, no_room).read(np.arange(90)), ROWS)
    with pytest.raises(DataError, match=r"2\.arrow.*has no room for it, and its rows have no CRC32s"):
        ShardReader(folder, shards, 2, no_room._replace(holds_all=True)).read(np.arange(41, 90))
    path.unlink()
    with pytest.raises(DataError, match=r"2\.arrow.*: it is missing"):
        verify_shards(folder, manifest, ShardCacheSpec(size_gb=1))


def test_a_cache_that_cannot_grow_gives_way_to_rows(folder, shards, plans, capfd):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The largest allowed file is smaller than two of the shards.
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        rows = ShardReader(folder, shards, 2, plans["whole"]).read(np.arange(90))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert np.array_equal(rows, ROWS)
    assert "cannot grow (File too large), so rows are read one by one" in capfd.readouterr().out


@pytest.mark.system
def test_a_cache_on_a_full_disk_keeps_what_fits(folder, shards, plans, tmp_path, capfd):
    """The disk, which only root can mount, has room for two of the three shards."""
    disk = tmp_path / "disk"
    disk.mkdir()
    process = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", disk], capture_output=True, text=True)
    if process.returncode:
        pytest.skip(f"no file system can be mounted: {process.stderr.strip()}")
    try:
        reader = ShardReader(folder, shards, 2, plans["whole"]._replace(path=disk))
        assert all(np.array_equal(reader.read(np.array([number])), ROWS[[number]]) for number in range(90))
        assert {file.name for file in disk.glob("*.*")} == {f"{shard.sha256}.arrow" for shard in shards[:2]}
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
    assert capfd.readouterr().out.count("cannot grow (No space left on device), so rows are read one by one") == 1
