"""A sweep's orders and the actions of its job on them, where no cluster is needed or none answers."""

import itertools

import pytest

from mhmoe_ray.cluster import jobs
from mhmoe_ray.cluster.connect import Connection, connect
from mhmoe_ray.data.shards.manifest import recipe
from mhmoe_ray.errors import DataError, RunError, SpecError, StorageError
from mhmoe_ray.report.variants import table
from mhmoe_ray.runs import events, history, metrics
from mhmoe_ray.runs.directory import Attempt, add_attempt, create_run, newest_number
from mhmoe_ray.runs.sweeps import Order, sweep_dir
from mhmoe_ray.spec import SweepRun
from mhmoe_ray.storage import write_json
from mhmoe_ray.sweep import client, scheduler
from tests.data.shards.manifests import manifest_of
from tests.specs import tiny_spec
from tests.watch import wait_until

NOWHERE = Connection("http://127.0.0.1:1", True, True, None)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(scheduler, "POLL_SECONDS", 0.0)


@pytest.fixture
def place(tmp_path):
    return sweep_dir(tmp_path / "runs", "heads-small")


def entry(folder, variant, **sections):
    spec = tiny_spec(folder, **sections)
    return SweepRun(variant=variant, seed=0, spec=spec.model_copy(update={"name": f"heads-{variant}-s0"}))


def ordered(place, entries, *, wanted=None, concurrent=1, retry=()):
    name = place.new_order()
    order = Order(
        size="small",
        concurrent=concurrent,
        entries=entries,
        wanted=[e.name for e in entries] if wanted is None else wanted,
        retry=dict(retry),
        job=name,
        address=NOWHERE.address,
        local=True,
        submitted=0.0,
    )
    place.write_order(name, order)
    return name


def begun(place, entry, *happened):
    """Create a run of the entry, whose cluster does not exist, with these events."""
    run = create_run(entry.spec)
    add_attempt(run, Attempt(f"{run.id}-1", NOWHERE.address, local=True))
    for kind in happened:
        events.record(run, kind)
    place.write_runs({**place.runs(), entry.name: run})
    return run


def prepare(spec):
    """Write a folder that counts as prepared for the spec, so that nothing is left to do."""
    spec.data.prepared.mkdir()
    write_json(spec.data.prepared / "manifest.json", manifest_of({"web": 9}, recipe(spec)).model_dump(mode="json"))


def run(place, name):
    scheduler.Sweep(place, name, NOWHERE).run()


def run_once(place, name):
    """Let the sweep's job look once at all runs, and then find that it is not its turn any more."""
    looks = itertools.chain([True] * 9, itertools.repeat(False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler.Sweep, "_is_its_turn", property(lambda self: next(looks)))
        run(place, name)


def test_the_last_order_is_the_same_for_everybody_and_has_what_it_lacks_from_those_before(tmp_path, place):
    old, new, gone = (entry(tmp_path, name) for name in ("old", "new", "gone"))
    ordered(place, [old, gone])
    begun(place, old, "submitted")
    same_moment = sorted(place.new_order() for _ in range(2))
    assert len(set(same_moment)) == 2
    assert all(name > place.orders()[-1] for name in same_moment)
    last = ordered(place, [new])
    assert place.orders()[-1] == last
    assert [e.name for e in place.entries()] == [new.name, old.name]


@pytest.mark.timeout(60)
def test_a_job_makes_way_at_once_for_one_that_was_asked_for_at_the_same_moment(tmp_path, place):
    """The other job waits for this one, so that they would wait for each other forever."""
    first = ordered(place, [entry(tmp_path, "a")])
    ordered(place, [entry(tmp_path, "a")])
    run(place, first)
    assert place.runs() == {}


@pytest.mark.filterwarnings("ignore:`use_:DeprecationWarning")  # of Ray's own making
def test_text_that_cannot_be_prepared_is_told_at_once_and_ends_the_job_when_the_others_had_their_turn(
    tmp_path, place, capsys
):
    without_text, other = entry(tmp_path, "a"), entry(tmp_path, "b", data={"prepared": "other"})
    prepare(other.spec)
    begun(place, other, "finished")
    name = ordered(place, [without_text, other])
    with pytest.raises(DataError, match="source web"):
        run(place, name)
    told = capsys.readouterr().out
    assert told.startswith(f"{other.name}: finished\n{without_text.name}: source web")
    assert "error: " not in told


def test_a_run_that_was_started_does_not_go_on_with_another_spec(tmp_path, place, capsys):
    was, now = entry(tmp_path, "a"), entry(tmp_path, "a", train={"lr": 0.5})
    prepare(now.spec)
    started = begun(place, was, "stopped")
    with pytest.raises(SpecError, match="run a-s0 was started with another spec: train"):
        client.check_same(place, [now])
    run(place, ordered(place, [now], retry={now.name: 1}))
    assert "a-s0: it was started with another spec: train" in capsys.readouterr().out
    assert started.spec().train.lr == was.spec.train.lr
    assert newest_number(started) == 1


def test_seeds_of_a_variant_are_of_one_spec_since_their_losses_are_averaged(tmp_path, place):
    was, other = entry(tmp_path, "a"), entry(tmp_path, "b", train={"lr": 0.5})
    ordered(place, [was])
    begun(place, was, "finished")

    def of_seed_1(**sections):
        spec = entry(tmp_path, "a", **sections).spec.model_copy(update={"name": "heads-a-s1", "seed": 1})
        return SweepRun(variant="a", seed=1, spec=spec)

    client.check_same(place, [other, of_seed_1()])
    why = "sweep heads-small: run a-s0, a seed of the same variant as a-s1, was started with another spec: train;"
    with pytest.raises(SpecError, match=why):
        client.check_same(place, [other, of_seed_1(train={"lr": 0.5})])


def test_a_storage_that_fails_is_asked_again(tmp_path, place, capsys):
    one = entry(tmp_path, "a")
    name = ordered(place, [one])
    started = begun(place, one, "finished")
    kept = started.events_file.rename(tmp_path / "kept")
    started.events_file.mkdir()  # which nobody can read

    def mended():
        started.events_file.rmdir()
        kept.rename(started.events_file)

    with pytest.MonkeyPatch.context() as patch:
        sleeps = iter([lambda: None, lambda: None, mended, lambda: None])
        patch.setattr(scheduler.time, "sleep", lambda _: next(sleeps)())
        run(place, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "STORAGE_SECONDS", 0.0)
        started.events_file.rename(kept)
        started.events_file.mkdir()
        with pytest.raises(StorageError, match=r"sweep heads-small: \[Errno 21\] Is a directory"):
            run(place, name)
        mended()
    run(place, name)
    told = capsys.readouterr().out
    assert told.count("the storage fails, and is asked again: [Errno 21] Is a directory") == 2
    assert told.endswith("a-s0: finished\n")


def test_runs_that_nobody_wants_now_count_as_long_as_they_live(tmp_path, place, capsys):
    """The unwanted run here has a cluster that does not answer, but has written a moment ago."""
    unwanted, wanted = entry(tmp_path, "a"), entry(tmp_path, "b")
    prepare(wanted.spec)
    begun(place, unwanted, "submitted", "started")
    run_once(place, ordered(place, [unwanted, wanted], wanted=[wanted.name]))
    assert "still following, but cluster http://127.0.0.1:1: nothing answers there" in capsys.readouterr().out
    assert list(place.runs()) == [unwanted.name]


def test_what_had_ended_before_it_was_asked_for_starts_again_once_and_what_ended_later_does_not(tmp_path, place):
    """This holds for any job: one that is started in place of a killed one has the same order."""
    names = ("before", "later", "started")
    entries = {name: entry(tmp_path, name) for name in names}
    prepare(entries["before"].spec)
    runs = {name: begun(place, entries[name], "stopped") for name in names}
    add_attempt(runs["started"], Attempt("again", NOWHERE.address, local=True))
    retry = {entries["before"].name: 1, entries["started"].name: 1}
    run_once(place, ordered(place, [*entries.values()], retry=retry, concurrent=3))
    assert {name: newest_number(one) for name, one in runs.items()} == {"before": 2, "later": 1, "started": 2}


def test_a_run_that_was_made_but_got_no_job_takes_the_new_spec(tmp_path, place):
    was, now = entry(tmp_path, "a"), entry(tmp_path, "a", train={"lr": 0.5})
    prepare(now.spec)
    made = create_run(was.spec)
    place.write_runs({was.name: made})
    client.check_same(place, [now])
    run_once(place, ordered(place, [now]))
    assert made.spec().train.lr == 0.5


def test_an_order_of_another_version_is_passed_over_where_a_newer_one_counts(tmp_path, place):
    old = ordered(place, [entry(tmp_path, "a")])
    (place.orders_folder / f"{old}.json").write_text("{}")
    with pytest.raises(RunError, match="damaged, or of another version"):
        place.order(old)
    ordered(place, [entry(tmp_path, "b")])
    assert [e.name for e in place.entries()] == ["b-s0"]


@pytest.mark.ray
def test_what_a_command_asked_for_goes_on_beside_what_the_next_one_asks_for_until_both_are_stopped(
    tmp_path, place, local_cluster
):
    connection = connect()
    first, over, second = (entry(tmp_path, name) for name in ("a", "over", "b"))
    begun(place, over, "finished")
    jobs.submit(connection, {"entrypoint": "sleep 300", "submission_id": "job-of-the-first", "runtime_env": {}})
    name = ordered(place, [first, over])
    order = place.order(name).model_copy(update={"job": "job-of-the-first", "address": connection.address})
    place.write_order(name, order)
    newest = place.order(client.submit(place, connection, [second], [second.name], size="small", concurrent=2))
    assert newest.wanted == [second.name, first.name]
    assert [e.name for e in newest.wanted_entries] == newest.wanted
    assert client.is_alive(newest)
    assert client.stop(place) == ({}, [])
    assert [client.is_alive(one) for one in (order, newest)] == [False, False]
    assert list(place.runs()) == [over.name]  # for the second waits until the first has made way


@pytest.mark.ray
def test_a_job_that_is_started_again_ends_where_the_sweep_was_stopped_meanwhile(tmp_path, place, local_cluster):
    """A user who follows the job saw it disappear before the sweep was stopped."""
    connection, wanted = connect(), entry(tmp_path, "a")
    order = place.order(ordered(place, [wanted]))
    place.stop_file.parent.mkdir(parents=True, exist_ok=True)
    place.stop_file.touch()
    started = place.order(client.again(place, connection, order))
    wait_until(lambda: not client.is_alive(started), "the end of the job")
    assert (place.stop_file.exists(), list(place.runs())) == (True, [])
    anew = place.order(client.submit(place, connection, [wanted], [wanted.name], size="small", concurrent=1))
    assert not place.stop_file.exists()
    jobs.stop(connection, anew.job)


def test_a_removed_run_is_begun_anew(tmp_path, place):
    wanted = entry(tmp_path, "a")
    prepare(wanted.spec)
    before = begun(place, wanted, "failed")
    sweep = scheduler.Sweep(place, ordered(place, [wanted]), NOWHERE)
    sweep._runs = place.runs()
    before.spec_file.unlink()
    sweep._start(wanted)  # which its cluster does not take
    assert place.runs()[wanted.name].id != before.id
    assert not before.spec_file.exists()


def test_stopping_marks_runs_whose_cluster_does_not_answer(tmp_path, place):
    training, over = entry(tmp_path, "a"), entry(tmp_path, "b")
    ordered(place, [training, over])
    runs = begun(place, training, "submitted", "started"), begun(place, over, "finished")
    stopping, unasked = client.stop(place)
    assert stopping == {training.name: "running"}
    assert [error.what for error in unasked] == [f"cluster {NOWHERE.address}"]
    assert [one.stop_file.exists() for one in runs] == [True, False]
    assert place.stop_file.exists()


def test_a_run_that_diverged_has_no_loss_in_the_table_and_takes_no_step_from_the_others(tmp_path, place):
    entries = [entry(tmp_path, name) for name in ("a", "b")]
    for one, last in zip(entries, (4.0, float("nan")), strict=True):
        trained = begun(place, one, "finished")
        for step, loss in ((10, 5.0), (20, last)):
            line = {metrics.STEP: step, metrics.GROUP: 1, metrics.VAL_LOSS: loss}
            history.append(trained, {**line, metrics.TOKENS: step, metrics.TOKENS_PER_S: 1.0})
        history.flush(trained)
    ordered(place, entries)
    a, b = table(place)
    assert (a["step"], a["loss"], a["states"]) == (20, 4.0, {"finished": 1})
    assert (b["loss"], b["states"]) == (None, {"finished, diverged": 1})
