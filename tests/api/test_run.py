"""Tests of `Run`, the handle of a run, with run directories and without a running cluster."""

import os
import time
from pathlib import Path

import pytest

import mhmoe_ray as mh
from mhmoe_ray.cluster import dashboard
from mhmoe_ray.errors import CheckpointError, ClusterError, JobError, RunError, SpecError, TokenError
from mhmoe_ray.runs import events, history, metrics
from mhmoe_ray.runs.directory import Attempt, RunDir, add_attempt, create_run, mark_imported
from mhmoe_ray.storage import remove_tree
from tests.checkpoint.huggingface.conftest import MIXTRAL, make_run
from tests.support.specs import tiny_spec

DEAD_CLUSTER = "http://127.0.0.1:1"


def record_attempt(directory: RunDir, number: int) -> None:
    add_attempt(directory, Attempt(f"job-{number}", DEAD_CLUSTER, local=True))
    events.record(directory, "submitted", attempt=number, job=f"job-{number}", address=DEAD_CLUSTER)


@pytest.fixture
def directory(tmp_path):
    """Return the directory of a run with two attempts, of which the second has not ended."""
    directory = create_run(tiny_spec(tmp_path))
    record_attempt(directory, 1)
    events.record(directory, "failed", reason="it did")
    record_attempt(directory, 2)
    events.record(directory, "began", attempt=2, host="here", pid=1)
    for step in (1, 2, 2):
        line = {metrics.STEP: step, metrics.LOSS: 3.0 - step, metrics.GROUP: 1, metrics.TOKENS: 10 * step}
        history.append(directory, {**line, metrics.TOKENS_PER_S: 9.0, metrics.TIME: 1000.0})
    return directory


def test_runs_are_found_by_id_prefix_and_path(tmp_path, directory, monkeypatch):
    run = mh.find_run(directory.id, tmp_path / "runs")
    assert run == mh.find_run("tiny", tmp_path / "runs") == mh.find_run(directory.path) == mh.Run(directory)
    assert mh.find_run(run) == mh.find_run(Path(run)) == run
    assert (run.id, run.path, run.spec) == (directory.id, directory.path, tiny_spec(tmp_path))
    monkeypatch.setenv("MHMOE_STORAGE", str(tmp_path / "runs"))
    assert mh.list_runs() == [mh.find_run()] == [run]
    monkeypatch.delenv("MHMOE_STORAGE")
    monkeypatch.chdir(tmp_path)
    assert mh.list_runs() == [run]
    with pytest.raises(RunError, match="there is no such run"):
        mh.find_run("other")


def test_a_handle_shows_what_the_directory_has(directory):
    run = mh.Run(directory)
    assert [(line["step"], line["loss"]) for line in run.metrics()] == [(1, 2.0), (2, 1.0)]
    assert run.state == run.status()["state"] == "unknown"
    assert run.status()["attempts"] == 2
    assert run.checkpoints() == []
    events.record(directory, "stopped", step=2)
    assert run.state == "stopped"


def test_checkpoints_have_name_step_and_path(tmp_path):
    run = mh.Run(make_run(tmp_path, MIXTRAL))
    [checkpoint] = run.checkpoints()
    assert checkpoint == ("step_00000007.1", 7, run.path / "checkpoints" / "step_00000007.1")
    for name in (None, 7, checkpoint):
        exported = run.export(tmp_path / f"out-{name}", name)
        assert (exported.model_type, exported.checkpoint) == ("mixtral", checkpoint.name)
    assert (tmp_path / "out-7" / "config.json").exists()
    for function in (run.export, lambda *_, **names: run.evaluate(**names)):
        with pytest.raises(CheckpointError, match=r"checkpoint 0: .*no checkpoint of this step; choose from step_0"):
            function(tmp_path / "other", checkpoint=0)


def test_an_imported_run_has_no_spec(tmp_path, directory):
    mark_imported(directory)
    with pytest.raises(RunError, match="it was imported, not trained here, so it has no spec"):
        _ = mh.Run(directory).spec


def test_wait_reports_each_event_of_the_newest_attempt_once(directory):
    reported_kinds = []

    def report(event):
        reported_kinds.append(event["event"])
        if event["event"] == "began":
            events.record(directory, "preparing", folder="prepared")
        if event["event"] == "preparing":
            events.record(directory, "finished", step=2)

    assert mh.Run(directory).wait(on_event=report) == "finished"
    assert reported_kinds == ["submitted", "began", "preparing", "finished"]


def test_wait_raises_the_reason_of_a_failure(directory):
    events.record(directory, "failed", reason="worker 1: out of memory")
    with pytest.raises(JobError, match=rf"^run {directory.id}: worker 1: out of memory; see `mhmoe logs"):
        mh.Run(directory).wait()


def test_wait_ends_after_its_timeout_and_leaves_the_run_alone(directory):
    start_time = time.monotonic()
    with pytest.raises(TimeoutError, match=r"is not over after 0\.3 s"):
        mh.Run(directory).wait(timeout=0.3)
    assert time.monotonic() - start_time < 10

    def interrupt(event):
        raise KeyboardInterrupt

    earlier_events = events.read(directory)
    with pytest.raises(KeyboardInterrupt):
        mh.Run(directory).wait(on_event=interrupt)
    assert events.read(directory) == earlier_events
    assert not directory.stop_file.exists()


def test_wait_passes_an_error_of_the_callback_on(directory):
    """`wait` tries again after an OSError of the storage, but not after one of the caller's function."""

    def fail(event):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        mh.Run(directory).wait(on_event=fail)


def test_wait_gives_up_on_a_cluster_that_does_not_answer(directory, monkeypatch):
    monkeypatch.setattr("mhmoe_ray.api.attempts.CLUSTER_POLL_SECONDS", 0.0)
    monkeypatch.setattr(dashboard, "SECONDS", 0.2)
    notes = []
    with pytest.raises(ClusterError, match="nothing answers there"):
        mh.Run(directory).wait(on_note=notes.append)
    [note] = notes
    assert note.startswith("still following, but cluster")


def test_a_run_that_is_over_is_neither_stopped_nor_resumed(directory):
    events.record(directory, "finished", step=2)
    run = mh.Run(directory)
    with pytest.raises(RunError, match="it is finished already"):
        run.stop()
    with pytest.raises(RunError, match="it is finished"):
        run.resume()
    with pytest.raises(RunError, match="its spec has 20 steps already"):
        run.resume(until=20)
    with pytest.raises(SpecError, match="change only cluster keys"):
        run.resume(overrides={"train.lr": 1})
    with pytest.raises(SpecError, match="until: it is '100'; give a whole number of steps"):
        run.resume(until="100")


def test_a_run_is_removed_when_it_is_over(directory):
    run = mh.Run(directory)
    with pytest.raises(RunError, match="its cluster does not answer"):
        run.remove()
    for file in (directory.events_file, directory.metrics_file):
        os.utime(file, (time.time() - 10_000,) * 2)
    run.remove()
    assert not directory.path.exists()


@pytest.mark.parametrize(
    ("address", "error", "message"),
    [
        ("http://127.0.0.1:8265", TokenError("cluster", "it refuses the token", "give it"), "it refuses the token"),
        ("http://ray.lab:8265", TokenError("cluster", "it refuses the token", "give it"), "it refuses the token"),
        (
            "http://ray.lab:8265",
            ClusterError("cluster", "nothing answers there", "check it"),
            "does not answer .* force",
        ),
        ("http://127.0.0.1:8265", ClusterError("cluster", "nothing answers there", "check it"), None),
    ],
)
def test_a_run_that_may_be_served_is_not_removed(directory, monkeypatch, address, error, message):
    def connect(_):
        raise error

    monkeypatch.setattr("mhmoe_ray.cluster.runs.connect_recorded", connect)
    events.record(directory, "finished", step=2)
    events.record(directory, "served", application="mhmoe", url="http://x", address=address, checkpoint="step_1.1")
    assert [a["status"] for a in mh.Run(directory).status()["served"]] == ["unknown"]
    if message:
        with pytest.raises(TokenError if isinstance(error, TokenError) else RunError, match=message):
            mh.Run(directory).remove()
        assert directory.path.exists()
    if not isinstance(error, TokenError):
        mh.Run(directory).remove(force=message is not None)
        assert not directory.path.exists()


def test_useless_arguments_of_an_evaluation_are_errors(tmp_path):
    run = mh.Run(make_run(tmp_path, MIXTRAL))
    for arguments, message in (
        ({"samples": 5}, "overrides and samples are about text"),
        ({"overrides": {"data.alpha": 1}}, "overrides and samples are about text"),
        ({"limit": 5}, "limit and task_folders are about tasks"),
        ({"prior": "uniform"}, "prior is for a model with router domain"),
    ):
        with pytest.raises(SpecError, match=message):
            run.evaluate(**arguments)


@pytest.mark.parametrize(
    "use",
    [
        lambda run: run.spec,
        lambda run: run.state,
        lambda run: run.status(),
        lambda run: run.metrics(),
        lambda run: run.checkpoints(),
        lambda run: run.logs(),
        lambda run: run.wait(),
        lambda run: run.stop(),
        lambda run: run.resume(),
        lambda run: run.check_resume(),
        lambda run: run.evaluate(),
        lambda run: run.export("out"),
        lambda run: run.remove(),
    ],
)
def test_a_removed_run_is_an_error(directory, use):
    run = mh.Run(directory)
    remove_tree(directory.path)
    with pytest.raises(RunError, match=f"^run {run.id}: it was removed"):
        use(run)


def test_wait_ends_when_the_run_is_removed(directory, monkeypatch):
    monkeypatch.setattr("mhmoe_ray.api.attempts.CLUSTER_POLL_SECONDS", 0.0)

    def remove_run(event):
        if directory.path.exists():
            remove_tree(directory.path)

    with pytest.raises(RunError, match=f"^run {directory.id}: it was removed"):
        mh.Run(directory).wait(on_event=remove_run)


def test_a_run_is_shown_by_its_id(directory):
    assert repr(mh.Run(directory)) == f"Run({directory.id!r})"
