"""Tests that new files and their names are on the disk before old ones are deleted."""

import resource
import signal

import pytest

from mhmoe_ray.checkpoint.manifest import committed_checkpoints
from mhmoe_ray.checkpoint.save import Saver
from mhmoe_ray.data.prepare.work import StagingDirectory, clean_up, publish
from mhmoe_ray.runs import history, metrics
from mhmoe_ray.storage import create_file
from tests.support.failpoints import watched_operations
from tests.support.runs import new_run
from tests.train import jobs

DELETIONS = ("unlink", "remove", "rmdir")


def unsynced_at_first_deletion(operations, is_old):
    """Return the paths that were written, or in which names were changed, but not synced before the first deletion of
    an old path."""
    unsynced, opened = set(), set()
    for kind, path in operations:
        if kind == "fsync":
            unsynced.discard(path)
        elif kind == "write":
            unsynced.add(path)
        elif kind in DELETIONS and is_old(path):
            return unsynced
        elif path not in opened and not path.name.endswith(".partial"):
            unsynced.add(path.parent)
        if kind == "open":
            opened.add(path)
    raise AssertionError("nothing old was deleted")


def test_a_checkpoint_is_on_the_disk_before_an_old_one_is_deleted(tmp_path):
    operations = []
    with watched_operations([tmp_path], operations.append):
        spec, run = new_run(tmp_path, {"workers": 1}, train={"keep_checkpoints": 1})
        trainer = jobs.build_trainer(spec)
        saver = Saver(run, trainer, group=1)
        for step in (1, 2):
            jobs.train(spec, trainer, 1)
            history.append(run, {metrics.STEP: step, metrics.GROUP: 1})
            saver.save(trainer.zero_counts())
            saver.wait()
    [checkpoint] = committed_checkpoints(run)
    assert checkpoint.name == "step_00000002.1"
    written_folders = {path.parent for kind, path in operations if kind == "write"}
    assert {checkpoint, checkpoint / "weights", checkpoint / "optim", run.routing, run.path} <= written_folders
    unsynced = unsynced_at_first_deletion(operations, lambda path: path.name == "manifest.json")
    # The placeholder files of `new_run` are written by the test and not by the project.
    placeholders = {run.tokenizer_file, spec.data.prepared / "manifest.json", spec.data.prepared, tmp_path}
    assert unsynced - placeholders == set()


def test_a_manifest_is_deleted_on_the_disk_before_the_files_that_it_lists(tmp_path):
    operations = []
    spec, run = new_run(tmp_path, {"workers": 1}, train={"keep_checkpoints": 1})
    trainer = jobs.build_trainer(spec)
    saver = Saver(run, trainer, group=1)
    with watched_operations([run.checkpoints / "step_00000000.1"], operations.append):
        saver.save(trainer.zero_counts())
        jobs.train(spec, trainer, 1)
        saver.save(trainer.zero_counts())
        saver.wait()
    manifest_deletion = operations.index(("unlink", run.checkpoints / "step_00000000.1/manifest.json"))
    assert operations[manifest_deletion + 1] == ("fsync", run.checkpoints / "step_00000000.1")
    assert {kind for kind, _ in operations[manifest_deletion + 2 :]} == {"unlink", "rmdir"}


def test_prepared_data_has_its_name_on_the_disk_before_its_parts_are_deleted(tmp_path):
    staging = StagingDirectory(tmp_path / "data.partial-1", tmp_path / "data.partial-1" / "job")
    staging.result_path.mkdir(parents=True)
    (staging.result_path / "manifest.json").touch()
    operations = []
    with watched_operations([tmp_path], operations.append):
        publish(staging, tmp_path / "data")
        clean_up(tmp_path / "data")
    assert (tmp_path / "data" / "manifest.json").exists()
    unsynced = unsynced_at_first_deletion(operations, lambda path: "data.partial-1" in str(path))
    assert unsynced == set()


def test_a_write_that_a_full_disk_cuts_off_is_an_error(tmp_path):
    """The system then writes a part of the data without an error."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"), create_file(tmp_path / "file") as file:
            file.write(bytes(1001))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
