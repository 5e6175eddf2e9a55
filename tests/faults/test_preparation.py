"""Tests of data preparations whose processes are killed, whose storage fails and whose downloads are disturbed."""

import errno
import json
import os
import random
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from secrets import token_hex

import psutil
import pytest
from pyarrow import fs

from mhmoe_ray.cluster.spawn import LocalCluster, process_tree
from tests.cli.conftest import write_spec
from tests.cli.run import Result, assert_one_line, command, mhmoe
from tests.data.texts import make_documents, write_documents, write_lines
from tests.faults import harness
from tests.support.proxy import Fault, FaultyProxy
from tests.support.s3 import CREDENTIALS
from tests.support.watch import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow]

OPERATIONS = {
    "write */quarantine/*": "EIO",
    "fsync */parts/*.tokens.*": "ENOSPC",
    "replace */parts/*.json": "EIO",
    "replace */prepared/train/*.arrow": "ENOSPC",
    "write */prepared/validation/*": "EIO",
}
"""Errors of operations of workers, given by kind and pattern of the path; they cover the stages of a preparation."""


def pids_with_word(cluster: LocalCluster, word: str) -> set[int]:
    """Return the processes of the cluster with `word` in their command line, which for a worker is its task's name."""
    pids = set()
    for process in process_tree(cluster.pid):
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        # The shell that starts a driver has the driver's words in its own command line.
        if any(word in w for w in words) and "sh" not in Path(words[0]).name:
            pids.add(process.pid)
    return pids


@pytest.mark.timeout(600)
def test_a_preparation_survives_the_death_of_a_worker_and_of_its_driver(tmp_path, local_cluster):
    for number in range(4):
        write_documents(tmp_path / f"raw/{number}/one.jsonl", make_documents(str(number), 4000))
    write_spec(tmp_path, data={"prepared": tmp_path / "undisturbed"})
    assert mhmoe(tmp_path, "data", "prepare", "spec.yaml").code == 0
    write_spec(tmp_path, data={"prepared": tmp_path / "disturbed"})
    words = command("data", "prepare", "spec.yaml")
    first_command = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        [driver] = wait_until(lambda: pids_with_word(local_cluster, "mhmoe_ray.data.prepare.job"), "the driver")
        victims = wait_until(lambda: pids_with_word(local_cluster, "ray::MapBatches"), "a worker with a task")
        assert harness.kill(max(victims))
        wait_until(lambda: list(tmp_path.glob("disturbed.partial-*/parts/*/*.json")), "the first part")
        harness.kill(driver, signal.SIGSTOP)
        assert not (tmp_path / "disturbed").exists()
        assert harness.kill(driver)
        err = first_command.communicate(timeout=200)[1]
    finally:
        first_command.kill()
    assert (first_command.returncode, "Traceback" in err) == (9, False), err
    assert err.splitlines()[-1].startswith("error: prepared data ")
    result = mhmoe(tmp_path, "data", "prepare", "spec.yaml")
    assert result.code == 0, result.err
    harness.assert_same_files(tmp_path / "disturbed", tmp_path / "undisturbed")
    assert {p.name for p in tmp_path.iterdir()} == {"raw", "spec.yaml", "undisturbed", "disturbed"}


def prepare_at_failpoints(folder: Path, name: str, errors: Mapping[str, str]) -> Result:
    """Prepare the text in a folder to its folder `name`; each operation fails once, and leaves a file `name`-NUMBER."""
    points = [[*words.split(), errors[words], f"{folder}/{name}-{number}"] for number, words in enumerate(errors)]
    data = {"prepared": folder / name, "max_bad_lines": 1, "validation_fraction": 0.2}
    write_spec(folder, data=data, cluster=harness.disturbing_environment(FAILPOINTS=json.dumps(points)))
    return mhmoe(folder, "data", "prepare", "spec.yaml")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, local_cluster) -> Path:
    """Return a folder of text with a bad line that was prepared without faults."""
    folder = tmp_path_factory.mktemp("text")
    write_lines(folder / "raw/a/one.jsonl", [b"no JSON"])
    write_documents(folder / "raw/b/one.jsonl", make_documents("b", 40))
    assert prepare_at_failpoints(folder, "undisturbed", {}).code == 0
    return folder / "undisturbed"


def test_failures_of_the_storage_of_workers_are_one_line_each(undisturbed):
    folder = undisturbed.parent
    for number, error in enumerate(OPERATIONS.values()):
        result = prepare_at_failpoints(folder, "failed", OPERATIONS)
        reason = os.strerror(getattr(errno, error))
        assert_one_line(result, 7, f"data {folder}/failed: {reason}; make room or repair the storage")
        assert (folder / f"failed-{number}").exists()
        assert not (folder / "failed").exists()
    assert prepare_at_failpoints(folder, "failed", OPERATIONS).code == 0
    harness.assert_same_files(folder / "failed", undisturbed)
    assert not list(folder.glob("*.partial-*"))


def test_tasks_of_workers_that_are_killed_while_they_write_are_repeated(undisturbed):
    folder = undisturbed.parent
    result = prepare_at_failpoints(folder, "killed", dict.fromkeys(OPERATIONS, "kill"))
    assert result.code == 0, result.err
    assert len(list(folder.glob("killed-*"))) == len(OPERATIONS)
    harness.assert_same_files(folder / "killed", undisturbed)
    assert not list(folder.glob("*.partial-*"))


@pytest.fixture
def upload(s3, tmp_path):
    """Return a proxy to the S3 server, and the source with a gzip file in each of three domains behind it."""
    query, system = s3
    proxy, name = FaultyProxy(int(query.rpartition(":")[2])), token_hex(3)
    for domain in "abc":
        texts = [random.Random(f"{domain} {number}").randbytes(100).hex() for number in range(40)]
        write_documents(tmp_path / f"raw/{domain}/one.jsonl.gz", texts)
    fs.copy_files(str(tmp_path / "raw"), f"bucket/{name}", destination_filesystem=system)
    return proxy, {"web": {"path": f"s3://bucket/{name}?{query.rpartition(':')[0]}:{proxy.port}"}}


def prepare_downloads(folder, sources, name, *options) -> Result:
    """Prepare the data of sources on S3 in the folder `name`."""
    data = {"prepared": folder / name, "sources": sources, "validation_fraction": 0.2}
    write_spec(folder, data=data, cluster={"runtime_env": {"env_vars": CREDENTIALS}})
    return mhmoe(folder, "data", "prepare", "spec.yaml", *options)


@pytest.mark.timeout(600)
def test_disturbed_downloads_change_no_shard(tmp_path, local_cluster, upload):
    proxy, sources = upload
    assert prepare_downloads(tmp_path, sources, "undisturbed").code == 0
    # Each file is read for the tokenizer first, and then to be tokenised.
    faults = [Fault("reset", "GET", "/a/one"), Fault("cut", "GET", "/b/one"), Fault("stall", "GET", "/c/one")] * 2
    proxy.disturb(*faults)
    result = prepare_downloads(tmp_path, sources, "disturbed")
    assert (result.code, proxy.pending_faults) == (0, []), result.err
    harness.assert_same_files(tmp_path / "disturbed", tmp_path / "undisturbed")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("intact_reads", [0, 1])
def test_a_bit_that_flips_in_a_gzip_stream_is_an_error(tmp_path, local_cluster, upload, intact_reads):
    """The bit flips when the tokenizer is trained, or when the text is tokenised."""
    proxy, sources = upload
    proxy.disturb(*[Fault("none", "GET", "/b/one")] * intact_reads, Fault("flip", "GET", "/b/one"))
    result = prepare_downloads(tmp_path, sources, "prepared", "--set", "data.max_bad_lines=1000")
    assert proxy.pending_faults == []
    assert_one_line(result, 4, "b/one.jsonl.gz line ", "its gzip stream is damaged", "repair or remove the file")
    assert not (tmp_path / "prepared").exists()
