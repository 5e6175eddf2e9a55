"""Retention of checkpoints: which of them are kept."""

import math

import pytest

from mhmoe_ray.checkpoint.manifest import MANIFEST, committed, last_step
from mhmoe_ray.checkpoint.retention import Retention, drop
from mhmoe_ray.runs import history, metrics
from mhmoe_ray.runs.directory import create_run
from tests.specs import tiny_spec


@pytest.fixture
def run(tmp_path):
    """Return a run with checkpoints of steps 10 to 50, a second one of step 30 by group 2, and an unfinished one of
    step 60."""
    run = create_run(tiny_spec(tmp_path))
    for name in ("10.1", "20.1", "30.1", "30.2", "40.2", "50.2"):
        step, group = name.split(".")
        folder = run.checkpoints / f"step_{int(step):08d}.{group}"
        (folder / "weights").mkdir(parents=True)
        (folder / MANIFEST).write_text("{}")
    (run.checkpoints / "step_00000060.2" / "weights").mkdir(parents=True)
    return run


def surplus(run, keep):
    return Retention(run, keep).surplus(50, None)


def validated(run, *losses):
    """Append validation losses to the run's history; each is given as (step, loss)."""
    for step, loss in losses:
        history.append(run, {metrics.STEP: step, metrics.GROUP: 1, metrics.VAL_LOSS: loss})


def names(paths):
    return [path.name.removeprefix("step_000000") for path in paths]


def test_the_newest_stay_and_the_rest_goes_oldest_first(run):
    assert names(surplus(run, 2)) == ["10.1", "20.1", "30.1", "30.2"]
    assert surplus(run, 6) == surplus(run, 9) == []


def test_the_best_stays_too(run):
    validated(run, (10, 5.0), (20, 3.0), (25, 1.0), (40, 4.0))  # of step 25 there is no checkpoint
    assert names(surplus(run, 1)) == ["10.1", "30.1", "30.2", "40.2"]
    assert names(surplus(run, 2)) == ["10.1", "30.1", "30.2"]


def test_a_loss_that_was_gone_back_behind_does_not_count(run):
    """A restart repeats steps, and the run's history then holds the loss of the repeated step."""
    validated(run, (10, 5.0), (20, 1.0), (20, 6.0))
    assert names(surplus(run, 1)) == ["20.1", "30.1", "30.2", "40.2"]


def test_of_two_of_a_step_the_later_is_the_best(run):
    """The history holds the loss of the later checkpoint; the earlier one was passed over as damaged."""
    validated(run, (20, 3.0), (30, 9.0), (30, 1.0), (40, 2.0))
    assert names(surplus(run, 1)) == ["10.1", "20.1", "30.1", "40.2"]


def test_it_reads_the_history_once_and_is_told_what_comes_after(run):
    retention = Retention(run, 1)
    validated(run, (10, 2.0))
    assert names(retention.surplus(10, None)) == ["20.1", "30.1", "30.2", "40.2"]
    run.metrics_file.unlink()
    assert names(retention.surplus(20, 1.0)) == ["10.1", "30.1", "30.2", "40.2"]
    assert names(retention.surplus(40, math.nan)) == ["10.1", "30.1", "30.2", "40.2"]
    assert names(retention.surplus(20, 3.0)) == ["20.1", "30.1", "30.2", "40.2"]  # again, from step 10 on


def test_what_a_later_group_wrote_is_newer_though_its_step_is_earlier(run):
    """Group 3 continued from before a damaged checkpoint, which must not outlive the checkpoint that replaces it."""
    folder = run.checkpoints / "step_00000045.3"
    folder.mkdir()
    (folder / MANIFEST).write_text("{}")
    assert names(committed(run))[-2:] == ["50.2", "45.3"]
    assert last_step(run) == 45
    assert names(surplus(run, 1)) == ["10.1", "20.1", "30.1", "30.2", "40.2", "50.2"]


def test_dropped_is_gone_and_others_are_not(run):
    drop(surplus(run, 2)[0])
    assert names(committed(run)) == ["20.1", "30.1", "30.2", "40.2", "50.2"]
    assert not (run.checkpoints / "step_00000010.1").exists()
    assert (run.checkpoints / "step_00000060.2").exists()
