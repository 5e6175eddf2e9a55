"""Tests of the names by which users choose a checkpoint, here a directory with an empty manifest."""

import pytest

from mhmoe_ray.checkpoint.find import SHOWN_CHECKPOINTS, find_checkpoint, find_run_or_checkpoint
from mhmoe_ray.checkpoint.manifest import MANIFEST, checkpoint_name
from mhmoe_ray.errors import CheckpointError, RunError
from mhmoe_ray.runs import events
from mhmoe_ray.runs.directory import Attempt, add_attempt, create_run
from tests.support.specs import tiny_spec


@pytest.fixture
def run(tmp_path):
    """Return a run without a checkpoint, which has not ended."""
    run = create_run(tiny_spec(tmp_path))
    add_attempt(run, Attempt("job-1", "http://127.0.0.1:9", local=True))
    return run


def add_checkpoint(run, step, group=1):
    path = run.checkpoints / checkpoint_name(step, group)
    path.mkdir()
    (path / MANIFEST).touch()
    return path


def test_a_checkpoint_is_found_by_its_name_and_its_step(run):
    paths = [add_checkpoint(run, 0, 0), add_checkpoint(run, 20), add_checkpoint(run, 20, 2)]
    assert [find_checkpoint(run, path.name) for path in paths] == paths
    assert find_checkpoint(run, 0) == find_checkpoint(run, "0") == paths[0]
    # If a step was repeated, the newer one of its two checkpoints counts.
    assert find_checkpoint(run, 20) == paths[2]
    storage = run.path.parent
    assert find_run_or_checkpoint(f"{run.id}@20", storage, "model") == paths[2]
    assert find_run_or_checkpoint("tiny@0", storage, "model") == paths[0]
    assert find_run_or_checkpoint(run.id, storage, "model") == run


def test_an_unknown_checkpoint_is_an_error_that_lists_those_of_the_run(run):
    newest = [add_checkpoint(run, step).name for step in range(12)][::-1]
    name_list = ", ".join(newest[:SHOWN_CHECKPOINTS])
    for name, kind in ((30, "step"), ("30", "step"), ("step_00000030.1", "name")):
        with pytest.raises(CheckpointError) as error:
            find_checkpoint(run, name)
        reason = f"checkpoint {name}: run {run.id} has no checkpoint of this {kind}"
        assert str(error.value) == f"{reason}; choose from {name_list} and 2 older ones"
    with pytest.raises(CheckpointError, match=r"^model tiny@30: run .* has no checkpoint of this step; choose from"):
        find_run_or_checkpoint("tiny@30", run.path.parent, "model tiny@30")


def test_a_run_that_is_over_gets_no_checkpoint_any_more(run):
    with pytest.raises(CheckpointError, match="it has no checkpoint yet; wait for one"):
        find_checkpoint(run, 0)
    events.record(run, "failed", reason="it did")
    with pytest.raises(CheckpointError, match="it is failed and has no checkpoint; use another run, or resume it"):
        find_checkpoint(run, 0)


def test_an_unknown_run_may_have_been_meant_as_a_folder(run):
    with pytest.raises(RunError, match=r"^model other: there is no such folder, and as a run: there is no such run in"):
        find_run_or_checkpoint("other", run.path.parent, "model other")
