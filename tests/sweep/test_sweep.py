"""Tests of a sweep's orders and of the job that runs them; most need no cluster or have one that does not answer.

An order names the runs that a user wants. A sweep's job starts the runs of the newest order.
"""

import itertools
import re

import pytest

from mhmoe_ray.cluster import jobs
from mhmoe_ray.cluster.connect import Connection, connect
from mhmoe_ray.data.shards.recipe import recipe
from mhmoe_ray.errors import DataError, RunError, SpecError, StorageError
from mhmoe_ray.report.variants import sweep_table
from mhmoe_ray.runs import events, history, metrics
from mhmoe_ray.runs.directory import Attempt, add_attempt, create_run, newest_attempt_number
from mhmoe_ray.runs.sweeps import SweepOrder, sweep_dir
from mhmoe_ray.spec import SweepRun
from mhmoe_ray.storage import write_json
from mhmoe_ray.sweep import client, scheduler
from tests.data.shards.manifests import make_manifest
from tests.support.events import append_line, record
from tests.support.saved import commit_checkpoint
from tests.support.specs import tiny_spec
from tests.support.watch import wait_until

NOWHERE = Connection("http://127.0.0.1:1", True, True, None)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Let sweep jobs poll without pauses."""
    monkeypatch.setattr(scheduler, "POLL_SECONDS", 0.0)


@pytest.fixture
def sweep(tmp_path):
    """Return the directory of a sweep without orders and runs."""
    return sweep_dir(tmp_path / "runs", "heads-small")


def make_entry(folder, variant, **sections):
    """Return the entry of a variant with seed 0 in a sweep; `sections` replaces keys of its tiny spec."""
    spec = tiny_spec(folder, **sections)
    return SweepRun(variant=variant, seed=0, spec=spec.model_copy(update={"name": f"heads-{variant}-s0"}))


def write_order(sweep, entries, *, wanted_names=None, concurrent=1, retry=()):
    """Write a new order of a sweep, whose job runs on no cluster, and return the order's name.

    Args:
        sweep: The sweep directory.
        entries: All entries of the order.
        wanted_names: The names of the entries that are to run; None if all are.
        concurrent: The number of runs at a time.
        retry: For each run to start again, its name and the number of its last attempt, as a mapping.
    """
    name = sweep.new_order_name()
    order = SweepOrder(
        size="small",
        concurrent=concurrent,
        entries=entries,
        wanted=[e.name for e in entries] if wanted_names is None else wanted_names,
        retry=dict(retry),
        job=name,
        address=NOWHERE.address,
        local=True,
        submitted=0.0,
    )
    sweep.write_order(name, order)
    return name


def start_run(sweep, entry, *event_kinds):
    """Create the run of an entry in the sweep, with an attempt on a cluster that does not answer, and return it.

    It records an event for each of `event_kinds`.
    """
    run = create_run(entry.spec)
    add_attempt(run, Attempt(f"{run.id}-1", NOWHERE.address, local=True))
    for kind in event_kinds:
        record(run, kind)
    sweep.write_runs({**sweep.runs(), entry.name: run})
    return run


def prepare(spec):
    """Write a manifest to the spec's prepared folder, so that its data counts as prepared."""
    spec.data.prepared.mkdir()
    write_json(spec.data.prepared / "manifest.json", make_manifest({"web": 9}, recipe(spec)).model_dump(mode="json"))


def run_job(sweep, name):
    """Run the job of an order in this process until it ends."""
    scheduler.Sweep(sweep, name, NOWHERE).run()


def run_job_once(sweep, name):
    """Run the job of an order for some polls of its runs; then it ends as if a newer order had replaced it."""
    order_checks = itertools.chain([True] * 9, itertools.repeat(False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler.Sweep, "_is_newest_order", property(lambda self: next(order_checks)))
        run_job(sweep, name)


def test_newest_order_is_last_by_name_and_earlier_orders_supply_missing_entries(tmp_path, sweep):
    old_entry, new_entry, removed_entry = (make_entry(tmp_path, name) for name in ("old", "new", "gone"))
    write_order(sweep, [old_entry, removed_entry])
    start_run(sweep, old_entry, "submitted")
    same_moment = sorted(sweep.new_order_name() for _ in range(2))
    assert len(set(same_moment)) == 2
    assert all(name > sweep.order_names()[-1] for name in same_moment)
    last_order = write_order(sweep, [new_entry])
    assert sweep.order_names()[-1] == last_order
    assert [e.name for e in sweep.entries()] == [new_entry.name, old_entry.name]


@pytest.mark.timeout(60)
def test_a_job_ends_at_once_if_a_newer_order_exists(tmp_path, sweep):
    """The newer job waits for the end of this one, so the two would wait forever if this one waited too."""
    first_order = write_order(sweep, [make_entry(tmp_path, "a")])
    write_order(sweep, [make_entry(tmp_path, "a")])
    run_job(sweep, first_order)
    assert sweep.runs() == {}


# The ignored warning is about code of Ray.
@pytest.mark.filterwarnings("ignore:`use_:DeprecationWarning")
def test_a_failed_preparation_is_printed_at_once_and_raised_after_the_other_runs(tmp_path, sweep, capsys):
    without_text, finished_entry = make_entry(tmp_path, "a"), make_entry(tmp_path, "b", data={"prepared": "other"})
    prepare(finished_entry.spec)
    start_run(sweep, finished_entry, "finished")
    name = write_order(sweep, [without_text, finished_entry])
    with pytest.raises(DataError, match="source web"):
        run_job(sweep, name)
    output = capsys.readouterr().out
    assert output.startswith(f"{finished_entry.name}: finished\n{without_text.name}: source web")
    assert "error: " not in output


def test_a_started_run_does_not_continue_with_another_spec(tmp_path, sweep, capsys):
    old_entry, new_entry = make_entry(tmp_path, "a"), make_entry(tmp_path, "a", train={"lr": 0.5})
    prepare(new_entry.spec)
    started_run = start_run(sweep, old_entry, "stopped")
    with pytest.raises(SpecError, match="run a-s0 was started with another spec: train"):
        client.check_unchanged_specs(sweep, [new_entry])
    run_job(sweep, write_order(sweep, [new_entry], retry={new_entry.name: 1}))
    assert "a-s0: it was started with another spec: train" in capsys.readouterr().out
    assert started_run.spec().train.lr == old_entry.spec.train.lr
    assert newest_attempt_number(started_run) == 1


def entry_from(folder, variant, source):
    """Return the entry of a variant that starts from another run of the sweep."""
    return make_entry(folder, variant, start={"from": f"sweep:{source}"})


def test_a_run_waits_for_the_run_that_it_starts_from(tmp_path, sweep, capsys):
    """The first job does not start the branch, because the base runs; the second job does, after the base has ended."""
    base, branch = make_entry(tmp_path, "base"), entry_from(tmp_path, "branch", "base")
    prepare(base.spec)
    base_run = start_run(sweep, base, "began")
    name = write_order(sweep, [branch, base], concurrent=2)
    run_job_once(sweep, name)
    assert list(sweep.runs()) == [base.name]
    write_checkpoint(base_run)
    events.record(base_run, "finished", step=20)
    run_job_once(sweep, name)
    [source] = sweep.runs()[branch.name].spec().start.sources
    assert source == str(base_run.checkpoints / "step_00000020.1")
    # The spec of the started run has the checkpoint's path where the sweep has the name of a run, which is no change.
    client.check_unchanged_specs(sweep, [branch, base])


def write_checkpoint(run):
    """Write a checkpoint of step 20 without files, and the run's tokenizer."""
    run.tokenizer_file.write_text("{}")
    checkpoint = run.checkpoints / "step_00000020.1"
    checkpoint.mkdir()
    commit_checkpoint(checkpoint, run.spec().model, step=20, tokens=0, position=0, seq_len=16, data_sha256=None)


def test_a_run_whose_start_is_not_wanted_is_not_started(tmp_path, sweep, capsys):
    base, branch = make_entry(tmp_path, "base"), entry_from(tmp_path, "branch", "base")
    leaf = entry_from(tmp_path, "leaf", "branch")
    prepare(base.spec)
    run_job(sweep, write_order(sweep, [base, branch, leaf], wanted_names=[branch.name, leaf.name]))
    output = capsys.readouterr().out
    assert f"{branch.name}: {base.name}, from which it starts, is not among the runs to start" in output
    assert f"{leaf.name}: {branch.name}, from which it starts, has not finished" in output
    assert sweep.runs() == {}


def test_a_run_whose_start_was_stopped_is_not_started(tmp_path, sweep, capsys):
    base, branch = make_entry(tmp_path, "base"), entry_from(tmp_path, "branch", "base")
    prepare(base.spec)
    start_run(sweep, base, "stopped")
    run_job(sweep, write_order(sweep, [base, branch]))
    assert f"{branch.name}: {base.name}, from which it starts, has not finished" in capsys.readouterr().out
    assert list(sweep.runs()) == [base.name]


def test_seeds_of_a_variant_must_have_one_spec(tmp_path, sweep):
    first_seed, other_variant = make_entry(tmp_path, "a"), make_entry(tmp_path, "b", train={"lr": 0.5})
    write_order(sweep, [first_seed])
    start_run(sweep, first_seed, "finished")

    def entry_of_seed_1(**sections):
        spec = make_entry(tmp_path, "a", **sections).spec.model_copy(update={"name": "heads-a-s1", "seed": 1})
        return SweepRun(variant="a", seed=1, spec=spec)

    client.check_unchanged_specs(sweep, [other_variant, entry_of_seed_1()])
    message = "sweep heads-small: run a-s0, a seed of the same variant as a-s1, was started with another spec: train;"
    with pytest.raises(SpecError, match=message):
        client.check_unchanged_specs(sweep, [other_variant, entry_of_seed_1(train={"lr": 0.5})])


def test_a_failing_storage_is_retried(tmp_path, sweep, capsys):
    finished_entry = make_entry(tmp_path, "a")
    name = write_order(sweep, [finished_entry])
    started_run = start_run(sweep, finished_entry, "finished")
    saved_events = started_run.events_file.rename(tmp_path / "kept")
    started_run.events_file.mkdir()  # a folder cannot be read as a file

    def repair():
        started_run.events_file.rmdir()
        saved_events.rename(started_run.events_file)

    with pytest.MonkeyPatch.context() as patch:
        sleeps = iter([lambda: None, lambda: None, repair, lambda: None])
        patch.setattr(scheduler.time, "sleep", lambda _: next(sleeps)())
        run_job(sweep, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "STORAGE_SECONDS", 0.0)
        started_run.events_file.rename(saved_events)
        started_run.events_file.mkdir()
        with pytest.raises(StorageError, match=r"sweep heads-small: file .*: it is no regular file"):
            run_job(sweep, name)
        repair()
    run_job(sweep, name)
    output = capsys.readouterr().out
    assert len(re.findall("the storage fails; trying again: file .*: it is no regular file", output)) == 2
    assert output.endswith("a-s0: finished\n")


def test_living_runs_of_earlier_orders_count_as_concurrent(tmp_path, sweep, capsys):
    """The run of the earlier order counts as living: its cluster does not answer, but it wrote something just now."""
    unwanted_entry, wanted_entry = make_entry(tmp_path, "a"), make_entry(tmp_path, "b")
    prepare(wanted_entry.spec)
    start_run(sweep, unwanted_entry, "submitted", "started")
    run_job_once(sweep, write_order(sweep, [unwanted_entry, wanted_entry], wanted_names=[wanted_entry.name]))
    assert "still following, but cluster http://127.0.0.1:1: nothing answers there" in capsys.readouterr().out
    assert list(sweep.runs()) == [unwanted_entry.name]


def test_only_runs_that_ended_before_the_order_start_again(tmp_path, sweep):
    """An order lists the last attempts of these runs, so a job that replaces a killed one starts the same runs."""
    names = ("before", "later", "started")
    entries = {name: make_entry(tmp_path, name) for name in names}
    prepare(entries["before"].spec)
    runs = {name: start_run(sweep, entries[name], "stopped") for name in names}
    add_attempt(runs["started"], Attempt("again", NOWHERE.address, local=True))
    retry = {entries["before"].name: 1, entries["started"].name: 1}
    run_job_once(sweep, write_order(sweep, [*entries.values()], retry=retry, concurrent=3))
    assert {name: newest_attempt_number(started_run) for name, started_run in runs.items()} == {
        "before": 2,
        "later": 1,
        "started": 2,
    }


def test_a_created_run_without_a_job_takes_the_new_spec(tmp_path, sweep):
    old_entry, new_entry = make_entry(tmp_path, "a"), make_entry(tmp_path, "a", train={"lr": 0.5})
    prepare(new_entry.spec)
    unstarted_run = create_run(old_entry.spec)
    sweep.write_runs({old_entry.name: unstarted_run})
    client.check_unchanged_specs(sweep, [new_entry])
    run_job_once(sweep, write_order(sweep, [new_entry]))
    assert unstarted_run.spec().train.lr == 0.5


def test_a_damaged_order_is_skipped_if_a_newer_one_exists(tmp_path, sweep):
    damaged_order = write_order(sweep, [make_entry(tmp_path, "a")])
    (sweep.orders_folder / f"{damaged_order}.json").write_text("{}")
    with pytest.raises(RunError, match="damaged, or written by another version"):
        sweep.read_order(damaged_order)
    write_order(sweep, [make_entry(tmp_path, "b")])
    assert [e.name for e in sweep.entries()] == ["b-s0"]


@pytest.mark.ray
def test_a_second_order_includes_the_unfinished_runs_of_the_first_until_both_are_stopped(
    tmp_path, sweep, local_cluster
):
    connection = connect()
    first_entry, finished_entry, second_entry = (make_entry(tmp_path, name) for name in ("a", "over", "b"))
    start_run(sweep, finished_entry, "finished")
    jobs.submit(connection, {"entrypoint": "sleep 300", "submission_id": "job-of-the-first", "runtime_env": {}})
    name = write_order(sweep, [first_entry, finished_entry])
    order = sweep.read_order(name).model_copy(update={"job": "job-of-the-first", "address": connection.address})
    sweep.write_order(name, order)
    newest = sweep.read_order(
        client.submit(sweep, connection, [second_entry], [second_entry.name], size="small", concurrent=2)
    )
    assert newest.wanted == [second_entry.name, first_entry.name]
    assert [e.name for e in newest.wanted_entries] == newest.wanted
    assert client.is_alive(newest)
    assert client.stop(sweep) == ({}, [])
    assert [client.is_alive(any_order) for any_order in (order, newest)] == [False, False]
    # The run of `second_entry` was not started, because the second job waits for the end of the first.
    assert list(sweep.runs()) == [finished_entry.name]


@pytest.mark.ray
def test_a_restarted_job_ends_if_the_sweep_was_stopped_meanwhile(tmp_path, sweep, local_cluster):
    """A command that follows a sweep restarts a job that disappears, also if the sweep was stopped in that moment."""
    connection, wanted_entry = connect(), make_entry(tmp_path, "a")
    order = sweep.read_order(write_order(sweep, [wanted_entry]))
    sweep.stop_file.parent.mkdir(parents=True, exist_ok=True)
    sweep.stop_file.touch()
    restarted_order = sweep.read_order(client.restart_job(sweep, connection, order))
    wait_until(lambda: not client.is_alive(restarted_order), "the end of the job")
    assert (sweep.stop_file.exists(), list(sweep.runs())) == (True, [])
    new_order = sweep.read_order(
        client.submit(sweep, connection, [wanted_entry], [wanted_entry.name], size="small", concurrent=1)
    )
    assert not sweep.stop_file.exists()
    jobs.stop(connection, new_order.job)


def test_a_removed_run_is_created_again(tmp_path, sweep):
    wanted_entry = make_entry(tmp_path, "a")
    prepare(wanted_entry.spec)
    removed_run = start_run(sweep, wanted_entry, "failed")
    job = scheduler.Sweep(sweep, write_order(sweep, [wanted_entry]), NOWHERE)
    job._runs = sweep.runs()
    removed_run.spec_file.unlink()
    job._start(wanted_entry)  # the cluster of the removed run does not answer
    assert sweep.runs()[wanted_entry.name].id != removed_run.id
    assert not removed_run.spec_file.exists()


def test_stopping_marks_runs_whose_cluster_does_not_answer(tmp_path, sweep):
    training, finished_entry = make_entry(tmp_path, "a"), make_entry(tmp_path, "b")
    write_order(sweep, [training, finished_entry])
    runs = start_run(sweep, training, "submitted", "started"), start_run(sweep, finished_entry, "finished")
    stopping, cluster_errors = client.stop(sweep)
    assert stopping == {training.name: "running"}
    assert [error.subject for error in cluster_errors] == [f"cluster {NOWHERE.address}"]
    assert [stopped_run.stop_file.exists() for stopped_run in runs] == [True, False]
    assert sweep.stop_file.exists()


def test_a_diverged_run_has_no_loss_in_the_table_and_does_not_change_the_step(tmp_path, sweep):
    entries = [make_entry(tmp_path, name) for name in ("a", "b")]
    for sweep_entry, last_loss in zip(entries, (4.0, float("nan")), strict=True):
        trained = start_run(sweep, sweep_entry, "finished")
        for step, loss in ((10, 5.0), (20, last_loss)):
            append_line(trained, step, val_loss=loss)
        history.flush(trained)
    write_order(sweep, entries)
    a, b = sweep_table(sweep)
    assert (a["step"], a["loss"], a["states"]) == (20, 4.0, {"finished": 1})
    assert (b["loss"], b["states"]) == (None, {"finished, diverged": 1})


def test_variants_with_different_numbers_of_steps_are_compared_at_their_ends(tmp_path, sweep):
    entries = [make_entry(tmp_path, name) for name in ("a", "b")]
    train = entries[1].spec.train.model_copy(update={"steps": 40})
    entries[1] = entries[1].model_copy(update={"spec": entries[1].spec.model_copy(update={"train": train})})
    for sweep_entry, steps in zip(entries, ((10, 20), (10, 20, 30, 40)), strict=True):
        trained = start_run(sweep, sweep_entry, "finished")
        for step in steps:
            append_line(trained, step, **{metrics.VAL_LOSS: 5.0 - step / 20, metrics.TOKENS: step})
        history.flush(trained)
    write_order(sweep, entries)
    assert [(row["step"], row["loss"]) for row in sweep_table(sweep)] == [(20, 4.0), (40, 3.0)]
