"""Tests of the progress of preparations and of the cleanup after them, without Ray."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from secrets import token_hex

import pytest

from mhmoe_ray.cli.follow import format_progress
from mhmoe_ray.data.prepare import work
from mhmoe_ray.data.prepare.pipeline import prepare
from mhmoe_ray.data.prepare.work import (
    ALIVE_FILE,
    ProgressReport,
    StagingDirectory,
    clean_up,
    publish,
    read_progress,
    shared_folder,
    staging_directory,
)
from mhmoe_ray.data.shards.manifest import MANIFEST_FILE, PUBLISHING_PREFIX, read_data_manifest
from mhmoe_ray.data.shards.recipe import recipe
from mhmoe_ray.errors import DataError, StorageError
from mhmoe_ray.storage import ObjectPath, write_json
from tests.data.shards.manifests import make_manifest
from tests.support.failpoints import Failpoint, failing_operation
from tests.support.specs import tiny_spec
from tests.support.watch import wait_until


def test_clean_up_keeps_files_of_other_folders(tmp_path):
    for name in ("prep[12].partial-a", "prep[12].partial-b", "prep1.partial-a", "prep[12]", "prep[12].other"):
        (tmp_path / name / "parts").mkdir(parents=True)
    clean_up(tmp_path / "prep[12]")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prep1.partial-a", "prep[12]", "prep[12].other"]


def test_publishing_leaves_out_what_killed_workers_left(tmp_path):
    for name in ("a.arrow", ".b.arrow.0f1e2d3c.partial"):
        write_json(tmp_path / "work" / "job" / "prepared" / "train" / name, {})
    publish(StagingDirectory(tmp_path / "work", tmp_path / "work" / "job"), tmp_path / "prepared")
    assert [path.name for path in (tmp_path / "prepared").rglob("*")] == ["train", "a.arrow"]


def stage_objects(folder, settings_hash):
    """Write a result to a staging directory on an object store."""
    shared_path = folder.with_name(f"prepared.partial-{settings_hash}")
    staging = StagingDirectory(shared_path, shared_path / token_hex(4))
    for name in ("train/web/0.arrow", MANIFEST_FILE):
        (staging.result_path / name).write_bytes(f"{settings_hash} {name}".encode())
    return staging


def test_of_jobs_that_publish_on_an_object_store_at_once_one_wins(s3):
    """Jobs with equal settings may both publish; those with other settings are refused, or leave the result alone."""
    folder = ObjectPath(f"s3://bucket/{token_hex(3)}/prepared?{s3[0]}")
    stagings = [stage_objects(folder, settings_hash) for settings_hash in ("aaaaaaaa", "bbbbbbbb", "aaaaaaaa")]
    with ThreadPoolExecutor(3) as threads:
        ends = [threads.submit(publish, staging, folder) for staging in stagings]
    errors = [end.exception() for end in ends]
    names = sorted(folder.tree_sizes())
    assert names == [MANIFEST_FILE, "train/web/0.arrow"]
    winner = (folder / MANIFEST_FILE).read_text()[:8]
    assert [(folder / name).read_text() for name in names] == [f"{winner} {name}" for name in names]
    assert not any(errors[i] for i in ((1,) if winner == "bbbbbbbb" else (0, 2)))
    assert all("a job with other settings publishes" in str(error) for error in errors if error)


def test_an_announced_or_complete_result_is_not_overwritten(s3):
    folder = ObjectPath(f"s3://bucket/{token_hex(3)}/prepared?{s3[0]}")
    (folder / f"{PUBLISHING_PREFIX}aaaaaaaa-1").touch()
    with pytest.raises(DataError, match="a job with other settings publishes its result there, or was killed"):
        publish(stage_objects(folder, "bbbbbbbb"), folder)
    publish(stage_objects(folder, "aaaaaaaa"), folder)
    publish(stage_objects(folder, "bbbbbbbb"), folder)
    assert (folder / "train/web/0.arrow").read_text() == "aaaaaaaa train/web/0.arrow"
    assert sorted(folder.tree_sizes()) == [MANIFEST_FILE, "train/web/0.arrow"]


def test_a_folder_that_is_being_published_is_not_there_yet(s3):
    folder = ObjectPath(f"s3://bucket/{token_hex(3)}/prepared?{s3[0]}")
    (folder / f"{PUBLISHING_PREFIX}aaaaaaaa-1").touch()
    assert read_data_manifest(folder) is None
    publish(stage_objects(folder, "aaaaaaaa"), folder)
    assert (folder / MANIFEST_FILE).read_text() == f"aaaaaaaa {MANIFEST_FILE}"
    (folder / MANIFEST_FILE).unlink()
    with pytest.raises(DataError, match=r"it has no manifest\.json"):
        read_data_manifest(folder)


def test_a_disk_that_fails_during_the_cleanup_is_one_line(tmp_path):
    failpoint = Failpoint("MainThread", 1, errno.EIO)
    with (
        pytest.raises(StorageError, match="prepared: it cannot be written: Input/output error; make room or repair"),
        failing_operation([tmp_path], failpoint, lambda *_: None),
    ):
        clean_up(tmp_path / "prepared")


def test_prepare_cleans_up_after_a_job_killed_at_its_end(tmp_path):
    """`prepare` returns the published manifest, and removes the files of a job that was killed after publishing it.

    Until then, the progress report makes the killed job look like a running preparation.
    """
    spec = tiny_spec(tmp_path)
    manifest = make_manifest({"web/a": 4}, recipe(spec))
    with staging_directory(spec) as staging:
        (staging.shared_path / "progress.json").write_text(
            '{"stage": "finishing", "done": 1, "total": 1, "documents": 1, "tokens": 1, "found_tokens": 0}'
        )
        assert read_progress(shared_folder(spec))
        write_json(staging.result_path / "manifest.json", manifest.model_dump(mode="json"))
        staging.result_path.rename(spec.data.prepared)
        assert prepare(spec) == manifest
    assert read_progress(shared_folder(spec)) is None
    assert list(tmp_path.iterdir()) == [spec.data.prepared]


def test_staging_directory_removes_stale_jobs_only(tmp_path, monkeypatch):
    monkeypatch.setattr(work, "TOUCH_SECONDS", 0.05)
    spec = tiny_spec(tmp_path)
    with staging_directory(spec) as first_staging, staging_directory(spec) as second_staging:
        shared_path = first_staging.shared_path
        first_staging.parts_path.mkdir()
        stale_folder = make_stale_folder(shared_path)
        wait_until(lambda: not stale_folder.exists(), "its removal")
        # Each job cleans up once between two heartbeats. After two more heartbeats of both jobs, each has cleaned up
        # again.
        for _ in range(2):
            for job in (first_staging, second_staging):
                heartbeat_file = job.job_path / ALIVE_FILE
                previous_time = heartbeat_file.stat().st_mtime_ns
                wait_until(
                    lambda heartbeat_file=heartbeat_file, previous_time=previous_time: (
                        heartbeat_file.stat().st_mtime_ns > previous_time
                    ),
                    "its next heartbeat",
                )
        assert {path.name for path in shared_path.iterdir()} == {
            first_staging.job_path.name,
            second_staging.job_path.name,
            "parts",
        }
    assert [path.name for path in shared_path.iterdir()] == ["parts"]


def test_stale_job_stays_while_our_heartbeat_is_as_old(tmp_path):
    """A job whose own heartbeat was old does not remove the folders of other jobs.

    After a pause of the machine or the storage, all other jobs look stale to the first job that runs again.
    """
    staging = StagingDirectory(tmp_path, tmp_path / "own")
    staging.job_path.mkdir()
    (staging.job_path / ALIVE_FILE).touch()
    stale_folder = make_stale_folder(staging.shared_path)
    heartbeats = work._touch_and_clean_up(staging, {})
    os.utime(stale_folder / ALIVE_FILE, (1, 1))
    heartbeats = work._touch_and_clean_up(staging, heartbeats)
    assert stale_folder.exists(), "it had a heartbeat since"
    os.utime(staging.job_path / ALIVE_FILE, (0, 0))
    heartbeats = work._touch_and_clean_up(staging, heartbeats)
    assert stale_folder.exists(), "our heartbeat is as old"
    work._touch_and_clean_up(staging, heartbeats)
    assert not stale_folder.exists()


def make_stale_folder(shared_path):
    stale_folder = shared_path / "dead"
    (stale_folder / "prepared" / "train").mkdir(parents=True)
    (stale_folder / ALIVE_FILE).touch()
    os.utime(stale_folder / ALIVE_FILE, (0, 0))
    return stale_folder


def test_progress_names_tokens_only_where_texts_are_tokenised(tmp_path):
    report = ProgressReport(tmp_path, total_bytes=2_000_000, done_bytes=500_000, documents=7)
    report.enter_stage("reading")
    line = format_progress(read_progress(tmp_path))
    assert "7 documents" in line
    assert "tokens" not in line
    report.enter_stage("tokenising")
    assert "0 tokens" in format_progress(read_progress(tmp_path))
