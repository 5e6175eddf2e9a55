import errno
import json
import math
import os
import resource
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from mhmoe_ray.checkpoint.manifest import newest_checkpoint, read_manifest
from mhmoe_ray.checkpoint.retention import delete_checkpoint
from mhmoe_ray.errors import CheckpointError, RunError, SpecError, StorageError
from mhmoe_ray.evaluate.score import Score
from mhmoe_ray.runs import events, history, jsonl, metrics
from mhmoe_ray.runs.directory import (
    Attempt,
    AttemptId,
    RunDir,
    add_attempt,
    create_run,
    find_run,
    list_runs,
    newest_attempt_number,
    read_attempts,
    require_newest_attempt,
)
from mhmoe_ray.runs.start import StartRecord, read_start, write_start
from mhmoe_ray.runs.sweeps import SweepDir, SweepOrder, sweep_dir
from mhmoe_ray.storage import ObjectPath
from mhmoe_ray.storage import files as manifests
from tests.support.events import append_line, record
from tests.support.s3 import CREDENTIALS
from tests.support.saved import write_checkpoint
from tests.support.specs import tiny_spec


@pytest.fixture
def run(tmp_path):
    return create_run(tiny_spec(tmp_path))


def test_runs_are_private_and_have_unique_ids(tmp_path):
    runs = [create_run(tiny_spec(tmp_path)) for _ in range(20)]
    assert len({r.id for r in runs}) == 20
    assert all(r.path.stat().st_mode & 0o777 == 0o700 for r in runs)


def test_find_run_takes_id_prefix_or_path(tmp_path):
    spec = tiny_spec(tmp_path)
    with pytest.raises(RunError, match="holds no run yet"):
        find_run(None, spec.storage)
    runs = [create_run(spec), create_run(spec)]
    for r in runs:
        add_attempt(r, Attempt("job", "http://x", local=True))
    assert list_runs(spec.storage) == runs
    assert find_run(None, spec.storage) == runs[1]
    for name in (runs[0].id, runs[0].id[:-1], str(runs[0].path)):
        assert find_run(name, spec.storage) == runs[0]
    with pytest.raises(RunError, match="it fits tiny-"):
        find_run("tiny-", spec.storage)
    with pytest.raises(RunError, match="there is no such run"):
        find_run("other", spec.storage)


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"\xff",
        b"[]",
        b"3",
        b'{"id": "x"}',
        b'{"attempts": []}',
        b'{"attempts": [{}]}',
        b'{"imported": "today"}',
        b'{"imported": 1e30}',
    ],
)
def test_damaged_run_json_hides_no_other_run(tmp_path, capsys, content):
    storage = tiny_spec(tmp_path).storage
    runs = [create_run(tiny_spec(tmp_path)) for _ in range(3)]
    for r in runs:
        add_attempt(r, Attempt("job", "http://x", local=True))
    damaged = runs.pop(1)
    damaged.attempts_file.write_bytes(content)
    assert list_runs(storage) == runs
    assert find_run(None, storage) == runs[1]
    assert find_run(runs[0].id[:-1], storage) == runs[0]
    message = (
        f"run {damaged.id}: its run.json cannot be read (it is damaged, or written by another program); "
        "repair that file, or remove"
    )
    assert [line.startswith(f"warning: {message}") for line in capsys.readouterr().err.splitlines()] == [True] * 3
    for name in (damaged.id, str(damaged.path)):
        with pytest.raises(RunError) as raised:
            find_run(name, storage)
        assert str(raised.value).startswith(message)


def test_unreadable_attempts_are_an_outage_of_the_storage(run):
    """Training goes on after an outage, and ends if a newer attempt is the reason of an error."""
    add_attempt(run, Attempt("a", "http://x", local=True))
    run.attempts_file.unlink()
    run.attempts_file.mkdir()
    with pytest.raises(StorageError, match=r"its run\.json cannot be read"):
        read_attempts(run)


def test_run_removed_while_listing_is_left_out(tmp_path, capsys, monkeypatch):
    kept_run, removed_run = (create_run(tiny_spec(tmp_path)) for _ in range(2))
    for r in (kept_run, removed_run):
        add_attempt(r, Attempt("job", "http://x", local=True))
    creation_time = RunDir.creation_time

    def remove_before_reading(run):
        if run == removed_run:
            run.attempts_file.unlink()
        return creation_time(run)

    monkeypatch.setattr(RunDir, "creation_time", remove_before_reading)
    assert list_runs(kept_run.path.parent) == [kept_run]
    assert capsys.readouterr().err == ""


@pytest.mark.long
def test_unreachable_storage_is_reported(monkeypatch):
    # Without credentials, the client would look for them in places that time out slowly.
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    unreachable = "s3://bucket/runs?scheme=http&region=us-east-1&endpoint_override=127.0.0.1:9"
    with pytest.raises(RunError, match=r"storage s3://.*check the address, and the credentials"):
        find_run(None, unreachable)


def test_unwritable_storage_is_reported(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(SpecError, match="set storage to a folder you can write"):
        create_run(tiny_spec(tmp_path))


@pytest.mark.parametrize(
    "write",
    [
        lambda run: run.write_spec(tiny_spec(run.path)),
        RunDir.request_stop,
        RunDir.clear_stop,
        RunDir.remove,
        lambda run: add_attempt(run, Attempt("job", "http://x", local=True)),
        lambda run: SweepDir(run.path / "sweeps/a").write_order("1", SweepOrder.model_construct(entries=[])),
        lambda run: SweepDir(run.path / "sweeps/a").write_runs({}),
        lambda run: write_start(run, StartRecord(how="copy", optimizer=False, ancestors=[])),
    ],
)
def test_failed_write_to_a_run_directory_is_reported(tmp_path, write):
    (tmp_path / "run").write_text("a file, in which there can be no other files")
    with pytest.raises(
        StorageError, match=r"^storage .*run.*: it cannot be written: .*; make room or repair the storage"
    ):
        write(RunDir(tmp_path / "run"))


def test_run_that_cannot_be_written_leaves_no_directory(tmp_path, monkeypatch):
    def fail(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("mhmoe_ray.runs.directory.replace_file", fail)
    with pytest.raises(StorageError, match="it cannot be written: No space left on device"):
        create_run(tiny_spec(tmp_path))
    assert not list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize(
    "read",
    [
        SweepDir.order_names,
        SweepDir.runs,
        lambda sweep: sweep.read_order("1"),
        lambda sweep: read_start(RunDir(sweep.path)),
    ],
)
def test_unreadable_directory_is_reported(tmp_path, read):
    (tmp_path / "sweeps").mkdir()
    with pytest.raises(StorageError, match="File name too long"):
        read(sweep_dir(tmp_path, "a" * 300))


def test_lines_survive_a_writer_killed_in_mid_line(tmp_path):
    path = tmp_path / "x.jsonl"
    jsonl.append(path, {"a": 1})
    with path.open("ab") as f:
        f.write(b'{"a": 2, "b"')
    jsonl.append(path, {"a": 3})
    assert [r["a"] for r in jsonl.read(path)] == [1, 3]


def test_write_without_space_is_reported_and_later_lines_survive(tmp_path):
    path, (soft, hard) = tmp_path / "x.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        jsonl.append(path, {"a": 1})
        with pytest.raises(StorageError, match="it cannot be written: File too large; make room"):
            jsonl.append(path, {"a": "2" * 100})  # only a part of this line is written
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.stat().st_size == 100
    jsonl.append(path, {"a": 3})
    assert [r["a"] for r in jsonl.read(path)] == [1, 3]


def test_tail_yields_each_complete_line_once(tmp_path):
    tail = jsonl.Tail(tmp_path / "x.jsonl")
    assert list(tail.new_lines()) == []
    jsonl.append(tmp_path / "x.jsonl", {"a": 1})
    assert list(tail.new_lines()) == [{"a": 1}]
    with (tmp_path / "x.jsonl").open("ab") as f:
        f.write(b'{"a": ')
        f.flush()
        assert list(tail.new_lines()) == []
        f.write(b"2}\n")
    assert list(tail.new_lines()) == [{"a": 2}]


def test_tail_yields_late_segment_with_an_earlier_name(tmp_path, s3, monkeypatch):
    """A segment of another machine, whose clock is behind, has an earlier name."""
    path = ObjectPath(f"s3://bucket/{tmp_path.name}/lines.jsonl?{s3[0]}")
    tail, lines = jsonl.Tail(path), []
    for name in ("20", "10", "15", "30"):
        monkeypatch.setattr(jsonl, "_segment_name", lambda _, name=name: name)
        jsonl.append(path, {"a": name})
        lines += tail.new_lines()
    assert lines == [{"a": "20"}, {"a": "10"}, {"a": "15"}, {"a": "30"}]
    # A segment to which lines are gathered grows, so the tail must also read the new end of a known segment.
    (path / "10").write_bytes((path / "10").read_bytes() + b'{"a": "11"}\n')
    assert list(tail.new_lines()) == [{"a": "11"}]
    assert list(tail.new_lines()) == []


def test_lines_on_an_object_store_keep_their_order_when_the_clock_is_set_back(tmp_path, s3, monkeypatch):
    path = ObjectPath(f"s3://bucket/{tmp_path.name}/lines.jsonl?{s3[0]}")
    for line, nanoseconds in enumerate((10**18, 10**18 + 3600 * 10**9, 10**18 - 3600 * 10**9, 10**18)):
        monkeypatch.setattr(jsonl.time, "time_ns", lambda value=nanoseconds: value)
        jsonl.append(path, {"line": line})
    assert [record["line"] for record in jsonl.read(path)] == [0, 1, 2, 3]


def test_history_has_newest_lines_of_repeated_steps(run):
    for group, steps in [(1, [1, 2, 3, 4]), (2, [3, 4, 5]), (3, [2])]:
        for step in steps:
            append_line(run, step, group=group)
    assert [(h[metrics.STEP], h[metrics.GROUP]) for h in history.read(run)] == [(1, 1), (2, 3)]


def test_later_group_counts_although_its_clock_is_behind(run):
    """The lines of a group whose clock is behind come first in the history on an object store."""
    for group, steps in [(2, [3, 4, 5]), (1, [1, 2, 3, 4])]:
        for step in steps:
            append_line(run, step, group=group)
    steps_and_groups = [(line[metrics.STEP], line[metrics.GROUP]) for line in history.read(run)]
    assert steps_and_groups == [(1, 1), (2, 1), (3, 2), (4, 2), (5, 2)]


def test_state_follows_events(run):
    states = []
    for kind in ("submitted", "began", "prepared", "started", "checkpoint", "failed", "submitted", "finished"):
        record(run, kind)
        states.append(events.state(events.read(run)))
    assert states == ["submitted", "preparing", "preparing", "running", "running", "failed", "submitted", "finished"]


def test_late_submitted_event_does_not_change_state(run):
    for kind, attempt in (("submitted", 1), ("began", 1), ("failed", None), ("began", 2), ("started", None)):
        record(run, kind, **({"attempt": attempt} if attempt else {}))
    events.record(run, "submitted", attempt=2)
    assert events.state(events.read(run)) == "running"
    events.record(run, "submitted", attempt=3)
    assert events.state(events.read(run)) == "submitted"


def test_events_of_the_newest_attempt_begin_with_its_submission(run):
    """The event "began" may precede the submission on an object store, and then it is the first one."""
    for kind, attempt in (("submitted", 1), ("began", 1), ("failed", None), ("began", 2), ("started", None)):
        record(run, kind, **({"attempt": attempt} if attempt else {}))
    assert events.of_newest_attempt(events.read(run)) == events.read(run)
    events.record(run, "submitted", attempt=2)
    assert events.of_newest_attempt(events.read(run)) == events.read(run)[3:]
    events.record(run, "submitted", attempt=3)
    assert events.of_newest_attempt(events.read(run)) == events.read(run)[-1:]


def test_run_has_weights_after_a_step_or_from_a_start(run):
    assert not events.has_weights(run)
    record(run, "initialized", sources=[], name="step_00000000.0")
    assert events.has_weights(run)
    run.events_file.unlink()
    append_line(run, 1)
    assert events.has_weights(run)


def test_attempts_are_numbered(run):
    for number, job in enumerate("ab", start=1):
        add_attempt(run, Attempt(job, "http://x", local=True))
        assert newest_attempt_number(run) == number
    assert [a.job for a in read_attempts(run)] == ["a", "b"]
    require_newest_attempt(run, AttemptId(2))
    # On an object store, two commands may record an attempt of the same number, and the first one is replaced.
    for replaced_attempt in (AttemptId(1), AttemptId(2, "token")):
        with pytest.raises(RunError, match="it was resumed elsewhere"):
            require_newest_attempt(run, replaced_attempt)


def test_one_of_several_commands_records_an_attempt(run):
    add_attempt(run, Attempt("first", "http://x", local=True))
    barrier = threading.Barrier(8)

    def resume(job: str) -> str:
        number = newest_attempt_number(run) + 1
        barrier.wait()
        try:
            add_attempt(run, Attempt(job, "http://x", local=True), number)
        except RunError as e:
            return str(e)
        return job

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(resume, "abcdefgh"))
    [job] = set(results) & set("abcdefgh")
    assert [a.job for a in read_attempts(run)] == ["first", job]
    errors = [result for result in results if result != job]
    assert errors == [f"run {run.id}: another command resumed it at the same moment; see `mhmoe status`"] * 7


def test_file_system_without_hard_links_records_attempts(run, monkeypatch):
    def no_hard_links(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_hard_links)
    for job in ("a", "b"):
        add_attempt(run, Attempt(job, "http://x", local=True))
    with pytest.raises(RunError, match="another command resumed it"):
        add_attempt(run, Attempt("c", "http://x", local=True), 2)
    assert [a.job for a in read_attempts(run)] == ["a", "b"]


def test_damaged_file_of_attempts_is_named(run):
    for job in ("a", "b"):
        add_attempt(run, Attempt(job, "http://x", local=True))
    (run.attempts / "000002.json").write_text("[]")
    with pytest.raises(RunError, match=r"its attempts/000002.json cannot be read \(it is damaged"):
        read_attempts(run)


def test_newest_intact_checkpoint_is_used(run):
    assert newest_checkpoint(run) is None
    paths = [write_checkpoint(run, 5), write_checkpoint(run, 10), write_checkpoint(run, 10, group=3)]
    (run.checkpoints / "step_00000011.4").mkdir()  # has no manifest, so it is uncommitted
    checkpoint, manifest, skipped = newest_checkpoint(run)
    assert (checkpoint, manifest.step, skipped) == (paths[2], 10, [])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda c: (c / "weights" / "w.safetensors").write_bytes(b"v" * 10), "does not have the hash"),
        (lambda c: (c / "weights" / "w.safetensors").write_bytes(b"w" * 9), "has 9 bytes, not 10"),
        (lambda c: (c / "weights" / "w.safetensors").unlink(), r"w\.safetensors is missing"),
        (lambda c: (c / "weights" / "other.safetensors").write_bytes(b""), "does not belong to it"),
        (lambda c: (c / "manifest.json").write_text("{"), r"manifest\.json is damaged"),
        (lambda c: (c / "manifest.json").write_text(json.dumps({"step": 10})), r"manifest\.json is damaged"),
    ],
)
def test_damaged_checkpoint_is_skipped(run, damage, reason):
    older, newer = write_checkpoint(run, 5), write_checkpoint(run, 10)
    damage(newer)
    with pytest.raises(CheckpointError, match=reason):
        read_manifest(newer)
    checkpoint, manifest, [error] = newest_checkpoint(run)
    assert (checkpoint, manifest.step) == (older, 5)
    assert str(newer) in str(error)


@pytest.fixture
def delete_while_reading(monkeypatch):
    """Return a function that arranges that a checkpoint is deleted as soon as one of its files is about to be hashed,
    and that `callback` is then called."""
    describe = manifests.describe_file

    def arrange(checkpoint, callback=lambda: None):
        def drop_first(path):
            if path.is_relative_to(checkpoint) and checkpoint.exists():
                delete_checkpoint(checkpoint)
                callback()
            return describe(path)

        monkeypatch.setattr(manifests, "describe_file", drop_first)

    return arrange


def test_checkpoint_dropped_while_read_is_reported(run, delete_while_reading):
    checkpoint = write_checkpoint(run, 5)
    delete_while_reading(checkpoint)
    with pytest.raises(
        CheckpointError, match=r"removed while it was read, because train\.keep_checkpoints .*; use a newer"
    ):
        read_manifest(checkpoint)


def test_newer_checkpoint_is_found_after_a_drop(run, delete_while_reading):
    write_checkpoint(run, 5)
    delete_while_reading(write_checkpoint(run, 10), lambda: write_checkpoint(run, 15))
    checkpoint, manifest, skipped = newest_checkpoint(run)
    assert (checkpoint.name, manifest.step, skipped) == ("step_00000015.1", 15, [])


def test_older_manifest_has_no_ends(run):
    path = write_checkpoint(run, 5) / "manifest.json"
    tree = json.loads(path.read_text())
    assert tree.pop("ends") == []
    path.write_text(json.dumps(tree))
    assert read_manifest(path.parent).ends == []


def test_training_does_not_start_anew_if_all_checkpoints_are_damaged(run):
    (write_checkpoint(run, 5) / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError):
        newest_checkpoint(run)


@pytest.mark.parametrize(("loss", "perplexity"), [(0.0, 1.0), (700.0, math.exp(700)), (710.0, None), (None, None)])
def test_perplexity_is_a_number_or_none(loss, perplexity):
    assert metrics.perplexity(loss) == perplexity
    assert loss is None or Score(nats=10 * loss, tokens=10, text_bytes=1).perplexity == perplexity


def test_moved_run_has_moved_paths(tmp_path):
    spec = tiny_spec(tmp_path / "old", data={"tokenizer": "tokenizer.json"})
    run = create_run(spec)
    assert run.spec() == spec
    (tmp_path / "old").rename(tmp_path / "new")
    moved_run = RunDir(tmp_path / "new" / run.path.relative_to(tmp_path / "old"))
    moved_spec = moved_run.spec()
    assert moved_spec == tiny_spec(tmp_path / "new", data={"tokenizer": "tokenizer.json"})
    spec.storage.mkdir(parents=True)  # the old folder exists again, so this run counts as a copy
    assert moved_run.spec() == spec


@pytest.mark.parametrize(("source", "moved_source"), [("{}/old/runs/a", "{}/new/runs/a"), ("hf://a/b", "hf://a/b")])
def test_moved_run_has_the_moved_path_of_its_start(tmp_path, source, moved_source):
    run = create_run(tiny_spec(tmp_path / "old", start={"from": source.format(tmp_path)}))
    (tmp_path / "old").rename(tmp_path / "new")
    moved_run = RunDir(tmp_path / "new" / run.path.relative_to(tmp_path / "old"))
    assert moved_run.spec().start.sources == [moved_source.format(tmp_path)]


def test_run_moved_into_another_folder_has_moved_paths(tmp_path):
    (tmp_path / "archive").mkdir()
    run = create_run(tiny_spec(tmp_path / "work/project"))
    (tmp_path / "work/project").rename(tmp_path / "archive/project")
    moved_run = RunDir(tmp_path / "archive/project" / run.path.relative_to(tmp_path / "work/project"))
    assert moved_run.spec() == tiny_spec(tmp_path / "archive/project")
