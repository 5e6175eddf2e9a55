"""Tests of runs on a disk that is full or becomes read-only; only root can mount such a disk."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mhmoe_ray.checkpoint.manifest import committed_checkpoints, newest_checkpoint
from mhmoe_ray.runs.directory import RunDir
from tests.cli.run import mhmoe
from tests.faults import harness
from tests.support.watch import events_of_kind, start_events, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.system]


@pytest.fixture
def disk(tmp_path):
    """Yield a folder on a new file system of 2 MB, and a function that remounts it with other mount options.

    The test is skipped where this user cannot mount.
    """
    folder = tmp_path / "disk"
    folder.mkdir()
    process = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, text=True)
    if process.returncode:
        pytest.skip(f"no file system can be mounted: {process.stderr.strip()}")

    def remount(options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)

    yield folder, remount
    subprocess.run(["umount", "-l", folder], check=True)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Make a folder read-only during the block, as if its disk were failing."""
    # Linux does not remount a file system read-only while files on it are open for writing. Therefore the folder is
    # bound over itself: this mount has no open files, so it can become read-only.
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def start_run_on_disk(project, disk, max_failures=0) -> RunDir:
    """Submit a run of 120 steps that is stored in the folder `disk`; return it."""
    harness.write_random_spec(project, train={"steps": 120}, cluster={"max_failures": max_failures})
    submitted = mhmoe(project, "submit", "spec.yaml", "--set", f"storage={disk}", "--detach")
    assert submitted.code == 0, submitted.err
    [run] = (RunDir(path.parent) for path in disk.glob("*/run.json"))
    return run


def assert_reason_and_whole_checkpoint(project, run, reason):
    """Assert that `mhmoe status` shows the reason without a traceback, and that the newest checkpoint is intact."""
    status = mhmoe(project, "status", str(run.path)).out
    assert reason in " ".join(status.split()), status
    assert "Traceback" not in status
    checkpoint, manifest, skipped = newest_checkpoint(run)
    assert (checkpoint, skipped) == (committed_checkpoints(run)[-1], [])
    assert 0 < manifest.step < 120


def test_a_full_disk_is_reported_and_costs_no_saved_step(project, reference, disk):
    folder, remount = disk
    run = start_run_on_disk(project, folder, max_failures=1000)
    wait_until(lambda: harness.outcome(project, run) == "failed", "the run's end")
    assert_reason_and_whole_checkpoint(project, run, "No space left on device")
    assert str(run.path) in mhmoe(project, "status", str(run.path)).out
    assert len(start_events(run)) == 1
    remount("size=100m")
    resumed = mhmoe(project, "resume", str(run.path))
    assert resumed.code == 0, resumed.err
    harness.assert_equals_undisturbed_run(run, reference)


def test_a_disk_that_becomes_read_only_is_reported_and_costs_no_saved_step(project, reference, disk):
    folder, remount = disk
    remount("size=100m")
    run = start_run_on_disk(project, folder)
    wait_until(lambda: events_of_kind(run, "checkpoint"), "a checkpoint")
    with read_only(folder):
        wait_until(lambda: harness.outcome(project, run) == "failed", "the run's end")
        assert_reason_and_whole_checkpoint(project, run, "Read-only file system")
    resumed = mhmoe(project, "resume", str(run.path))
    assert resumed.code == 0, resumed.err
    harness.assert_equals_undisturbed_run(run, reference)
