"""Tests of checkpoint retention: the newest checkpoints, the best one and those in use are kept."""

import math

import pytest

from mhmoe_ray.checkpoint.manifest import MANIFEST, committed_checkpoints, last_step
from mhmoe_ray.checkpoint.retention import RetentionPolicy, delete_checkpoint
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import create_run
from tests.support.events import append_line
from tests.support.specs import tiny_spec


@pytest.fixture
def run(tmp_path):
    """Return a run with checkpoints of steps 10 to 50, two of them of step 30, and an uncommitted one of step 60."""
    run = create_run(tiny_spec(tmp_path))
    for name in ("10.1", "20.1", "30.1", "30.2", "40.2", "50.2"):
        step, group = name.split(".")
        folder = run.checkpoints / f"step_{int(step):08d}.{group}"
        (folder / "weights").mkdir(parents=True)
        (folder / MANIFEST).write_text("{}")
    (run.checkpoints / "step_00000060.2" / "weights").mkdir(parents=True)
    return run


def removable_checkpoints(run, newest_count):
    """Return the checkpoints that may be removed after step 50 if the newest `newest_count` are kept."""
    return RetentionPolicy(run, newest_count).removable_checkpoints(50, None)


def record_losses(run, *losses):
    """Append validation losses to the run's history, each given as (step, loss)."""
    for step, loss in losses:
        append_line(run, step, val_loss=loss)


def short_names(paths):
    """Return names such as 10.1 for checkpoints of step 10 and worker group 1."""
    return [path.name.removeprefix("step_000000") for path in paths]


def test_newest_checkpoints_are_kept(run):
    assert short_names(removable_checkpoints(run, 2)) == ["10.1", "20.1", "30.1", "30.2"]
    assert removable_checkpoints(run, 6) == removable_checkpoints(run, 9) == []


def test_best_checkpoint_is_kept(run):
    # Step 25 has the lowest loss but no checkpoint, so the best checkpoint is that of step 20.
    record_losses(run, (10, 5.0), (20, 3.0), (25, 1.0), (40, 4.0))
    assert short_names(removable_checkpoints(run, 1)) == ["10.1", "30.1", "30.2", "40.2"]
    assert short_names(removable_checkpoints(run, 2)) == ["10.1", "30.1", "30.2"]


def test_checkpoint_that_an_application_served_last_is_kept(run):
    def serve(address, application, checkpoint):
        events.record(run, "served", address=address, application=application, checkpoint=checkpoint, url="http://x")

    retention = RetentionPolicy(run, 1)
    serve("http://a", "mhmoe", "step_00000010.1")
    serve("http://b", "mhmoe", "step_00000010.1")
    serve("http://a", "other", "step_00000030.1")
    assert short_names(retention.removable_checkpoints(50, None)) == ["20.1", "30.2", "40.2"]
    # The other cluster still serves the checkpoint of step 10.
    serve("http://a", "mhmoe", "step_00000020.1")
    assert short_names(retention.removable_checkpoints(50, None)) == ["30.2", "40.2"]
    serve("http://b", "mhmoe", "step_00000020.1")
    assert short_names(retention.removable_checkpoints(50, None)) == ["10.1", "30.2", "40.2"]


def test_checkpoint_of_an_unfinished_batch_inference_is_kept(run):
    retention = RetentionPolicy(run, 1)
    events.record(run, "answering", output="/first", checkpoint="step_00000010.1")
    events.record(run, "answering", output="/second", checkpoint="step_00000010.1")
    events.record(run, "answering", output="/third", checkpoint="step_00000030.1")
    assert short_names(retention.removable_checkpoints(50, None)) == ["20.1", "30.2", "40.2"]
    # The job of the third folder was ended before it had answers, and the folder is used with another checkpoint now.
    events.record(run, "answering", output="/third", checkpoint="step_00000040.2")
    events.record(run, "answered", output="/first")
    assert short_names(retention.removable_checkpoints(50, None)) == ["20.1", "30.1", "30.2"]
    events.record(run, "answered", output="/second")
    assert short_names(retention.removable_checkpoints(50, None)) == ["10.1", "20.1", "30.1", "30.2"]


def test_use_of_a_run_that_cannot_be_written_is_a_warning(tmp_path):
    run = create_run(tiny_spec(tmp_path))
    run.events_file.mkdir()
    warnings = []
    events.record_use(run, "answering", warnings.append, output="/out", checkpoint="step_00000010.1")
    [warning] = warnings
    assert warning.startswith(f"warning: storage {run.events_file}: it cannot be written: ")


def test_replaced_loss_does_not_count(run):
    """A restart repeats steps, and the history then has the loss of the repeated step only."""
    record_losses(run, (10, 5.0), (20, 1.0), (20, 6.0))
    assert short_names(removable_checkpoints(run, 1)) == ["20.1", "30.1", "30.2", "40.2"]


def test_later_of_two_checkpoints_of_a_step_is_the_best(run):
    """The history has the loss of the later checkpoint; the earlier one was skipped because it was damaged."""
    record_losses(run, (20, 3.0), (30, 9.0), (30, 1.0), (40, 2.0))
    assert short_names(removable_checkpoints(run, 1)) == ["10.1", "20.1", "30.1", "40.2"]


def test_history_is_read_once(run):
    """The policy remembers the losses in the history, and updates them with the loss of each later call."""
    retention = RetentionPolicy(run, 1)
    record_losses(run, (10, 2.0))
    assert short_names(retention.removable_checkpoints(10, None)) == ["20.1", "30.1", "30.2", "40.2"]
    run.metrics_file.unlink()
    assert short_names(retention.removable_checkpoints(20, 1.0)) == ["10.1", "30.1", "30.2", "40.2"]
    assert short_names(retention.removable_checkpoints(40, math.nan)) == ["10.1", "30.1", "30.2", "40.2"]
    # The repeated step 20 has a worse loss, so the best checkpoint is that of step 10.
    assert short_names(retention.removable_checkpoints(20, 3.0)) == ["20.1", "30.1", "30.2", "40.2"]


def test_later_group_is_newer_although_its_step_is_earlier(run):
    """Worker group 3 continued from a step before 45, because the checkpoint of step 50 was damaged."""
    folder = run.checkpoints / "step_00000045.3"
    folder.mkdir()
    (folder / MANIFEST).write_text("{}")
    assert short_names(committed_checkpoints(run))[-2:] == ["50.2", "45.3"]
    assert last_step(run) == 45
    assert short_names(removable_checkpoints(run, 1)) == ["10.1", "20.1", "30.1", "30.2", "40.2", "50.2"]


def test_delete_checkpoint_removes_one_checkpoint(run):
    delete_checkpoint(removable_checkpoints(run, 2)[0])
    assert short_names(committed_checkpoints(run)) == ["20.1", "30.1", "30.2", "40.2", "50.2"]
    assert not (run.checkpoints / "step_00000010.1").exists()
    assert (run.checkpoints / "step_00000060.2").exists()
