import json
import math
import resource

import pytest

from mhmoe_ray import storage as manifests
from mhmoe_ray.checkpoint.manifest import Manifest, commit, newest_checkpoint, read_manifest
from mhmoe_ray.checkpoint.retention import drop
from mhmoe_ray.errors import CheckpointError, RunError, SpecError, StorageError
from mhmoe_ray.evaluate.score import Score
from mhmoe_ray.runs import events, history, jsonl, metrics
from mhmoe_ray.runs.directory import (
    Attempt,
    RunDir,
    add_attempt,
    create_run,
    find_run,
    list_runs,
    newest_number,
    read_attempts,
    require_newest,
)
from mhmoe_ray.storage import ObjectPath, describe_file
from tests.s3 import CREDENTIALS
from tests.specs import tiny_spec


@pytest.fixture
def run(tmp_path):
    return create_run(tiny_spec(tmp_path))


def write_checkpoint(run, step, group=1):
    checkpoint = run.checkpoints / f"step_{step:08d}.{group}"
    (checkpoint / "weights").mkdir(parents=True)
    (checkpoint / "weights" / "w.safetensors").write_bytes(b"w" * step)
    files = {"weights/w.safetensors": describe_file(checkpoint / "weights" / "w.safetensors")}
    spec = run.spec()
    fields = {"step": step, "tokens": 1, "position": 1, "seed": 0, "world": 1, "ep": 1, "model": spec.model}
    commit(checkpoint, Manifest(**fields, seq_len=16, tokenizer_sha256="", data_sha256="", files=files))
    return checkpoint


def test_runs_are_private_and_never_share_a_name(tmp_path):
    made = [create_run(tiny_spec(tmp_path)) for _ in range(20)]
    assert len({r.id for r in made}) == 20
    assert all(r.path.stat().st_mode & 0o777 == 0o700 for r in made)


def test_a_run_is_found_by_id_prefix_and_path_and_the_newest_by_nothing(tmp_path):
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
    [b"{", b"\xff", b"[]", b"3", b'{"id": "x"}', b'{"attempts": []}', b'{"attempts": [{}]}', b'{"imported": "today"}'],
)
def test_a_run_json_that_is_damaged_or_foreign_hides_no_other_run(tmp_path, capsys, content):
    storage = tiny_spec(tmp_path).storage
    runs = [create_run(tiny_spec(tmp_path)) for _ in range(3)]
    for r in runs:
        add_attempt(r, Attempt("job", "http://x", local=True))
    damaged = runs.pop(1)
    damaged.attempts_file.write_bytes(content)
    assert list_runs(storage) == runs
    assert find_run(None, storage) == runs[1]
    assert find_run(runs[0].id[:-1], storage) == runs[0]
    told = f"run {damaged.id}: its run.json cannot be read (it is damaged, or not ours); mend that file, or remove"
    assert [line.startswith(f"warning: {told}") for line in capsys.readouterr().err.splitlines()] == [True] * 3
    for name in (damaged.id, str(damaged.path)):
        with pytest.raises(RunError) as raised:
            find_run(name, storage)
        assert str(raised.value).startswith(told)


def test_a_run_that_is_removed_while_runs_are_listed_is_none(tmp_path, capsys, monkeypatch):
    stays, goes = (create_run(tiny_spec(tmp_path)) for _ in range(2))
    for r in (stays, goes):
        add_attempt(r, Attempt("job", "http://x", local=True))
    created = RunDir.created

    def gone_before_it_is_read(run):
        if run == goes:
            run.attempts_file.unlink()
        return created(run)

    monkeypatch.setattr(RunDir, "created", gone_before_it_is_read)
    assert list_runs(stays.path.parent) == [stays]
    assert capsys.readouterr().err == ""


def test_storage_that_cannot_be_reached_is_said(monkeypatch):
    for name, value in CREDENTIALS.items():  # else they would be looked for elsewhere, which takes its time
        monkeypatch.setenv(name, value)
    nobody = "s3://bucket/runs?scheme=http&region=us-east-1&endpoint_override=127.0.0.1:9"
    with pytest.raises(RunError, match=r"storage s3://.*check the address, and the credentials"):
        find_run(None, nobody)


def test_storage_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(SpecError, match="set storage to a folder you can write"):
        create_run(tiny_spec(tmp_path))


def test_lines_survive_a_writer_killed_in_mid_line(tmp_path):
    path = tmp_path / "x.jsonl"
    jsonl.append(path, {"a": 1})
    with path.open("ab") as f:
        f.write(b'{"a": 2, "b"')
    jsonl.append(path, {"a": 3})
    assert [r["a"] for r in jsonl.read(path)] == [1, 3]


def test_a_line_that_has_no_room_is_told_and_those_after_it_survive(tmp_path):
    path, (soft, hard) = tmp_path / "x.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        jsonl.append(path, {"a": 1})
        with pytest.raises(StorageError, match="it cannot be written: File too large; make room"):
            jsonl.append(path, {"a": "2" * 100})  # of which a part is written
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.stat().st_size == 100
    jsonl.append(path, {"a": 3})
    assert [r["a"] for r in jsonl.read(path)] == [1, 3]


def test_a_tail_gives_each_whole_line_once(tmp_path):
    tail = jsonl.Tail(tmp_path / "x.jsonl")
    assert list(tail.new()) == []
    jsonl.append(tmp_path / "x.jsonl", {"a": 1})
    assert list(tail.new()) == [{"a": 1}]
    with (tmp_path / "x.jsonl").open("ab") as f:
        f.write(b'{"a": ')
        f.flush()
        assert list(tail.new()) == []
        f.write(b"2}\n")
    assert list(tail.new()) == [{"a": 2}]


def test_a_tail_misses_no_segment_that_comes_later_though_its_name_is_earlier(tmp_path, s3, monkeypatch):
    """The clock of another machine gave the segment its name."""
    path = ObjectPath(f"s3://bucket/{tmp_path.name}/lines.jsonl?{s3[0]}")
    tail, found = jsonl.Tail(path), []
    for name in ("20", "10", "15", "30"):
        monkeypatch.setattr(jsonl, "_segment_name", lambda name=name: name)
        jsonl.append(path, {"a": name})
        found += tail.new()
    assert found == [{"a": "20"}, {"a": "10"}, {"a": "15"}, {"a": "30"}]
    (path / "10").write_bytes((path / "10").read_bytes() + b'{"a": "11"}\n')  # where lines are gathered, one grows
    assert list(tail.new()) == [{"a": "11"}]
    assert list(tail.new()) == []


def test_history_takes_repeated_steps_from_the_last_who_did_them(run):
    for group, steps in [(1, [1, 2, 3, 4]), (2, [3, 4, 5]), (3, [2])]:
        for step in steps:
            history.append(run, {metrics.STEP: step, metrics.GROUP: group})
    assert [(h[metrics.STEP], h[metrics.GROUP]) for h in history.read(run)] == [(1, 1), (2, 3)]


def test_a_later_start_counts_though_its_clock_is_behind(run):
    """The lines of that start then come first on an object store."""
    for group, steps in [(2, [3, 4, 5]), (1, [1, 2, 3, 4])]:
        for step in steps:
            history.append(run, {metrics.STEP: step, metrics.GROUP: group})
    found = [(line[metrics.STEP], line[metrics.GROUP]) for line in history.read(run)]
    assert found == [(1, 1), (2, 1), (3, 2), (4, 2), (5, 2)]


def test_state_follows_events(run):
    seen = []
    for kind in ("submitted", "began", "prepared", "started", "checkpoint", "failed", "submitted", "finished"):
        events.record(run, kind)
        seen.append(events.state(events.events(run)))
    assert seen == ["submitted", "preparing", "preparing", "running", "running", "failed", "submitted", "finished"]


def test_a_job_that_runs_is_not_submitted_by_a_clock_that_is_ahead(run):
    for kind, attempt in (("submitted", 1), ("began", 1), ("failed", None), ("began", 2), ("started", None)):
        events.record(run, kind, **({"attempt": attempt} if attempt else {}))
    events.record(run, "submitted", attempt=2)
    assert events.state(events.events(run)) == "running"
    events.record(run, "submitted", attempt=3)
    assert events.state(events.events(run)) == "submitted"


def test_attempts_are_numbered(run):
    for number, job in enumerate("ab", start=1):
        add_attempt(run, Attempt(job, "http://x", local=True))
        assert newest_number(run) == number
    assert [a.job for a in read_attempts(run)] == ["a", "b"]
    require_newest(run, 2)
    with pytest.raises(RunError, match="it was resumed elsewhere"):
        require_newest(run, 1)


def test_the_newest_whole_checkpoint_is_used(run):
    assert newest_checkpoint(run) is None
    paths = [write_checkpoint(run, 5), write_checkpoint(run, 10), write_checkpoint(run, 10, group=3)]
    (run.checkpoints / "step_00000011.4").mkdir()  # never committed
    found, manifest, skipped = newest_checkpoint(run)
    assert (found, manifest.step, skipped) == (paths[2], 10, [])


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
def test_a_damaged_checkpoint_is_told_and_the_one_before_is_used(run, damage, reason):
    older, newer = write_checkpoint(run, 5), write_checkpoint(run, 10)
    damage(newer)
    with pytest.raises(CheckpointError, match=reason):
        read_manifest(newer)
    found, manifest, [error] = newest_checkpoint(run)
    assert (found, manifest.step) == (older, 5)
    assert str(newer) in str(error)


@pytest.fixture
def dropped_while_read(monkeypatch):
    """Return a function that arranges for a checkpoint to be dropped when the first of its files is hashed."""
    describe = manifests.describe_file

    def arrange(checkpoint, then=lambda: None):
        def drop_first(path):
            if path.is_relative_to(checkpoint) and checkpoint.exists():
                drop(checkpoint)
                then()
            return describe(path)

        monkeypatch.setattr(manifests, "describe_file", drop_first)

    return arrange


def test_a_checkpoint_that_is_dropped_while_it_is_read_is_told(run, dropped_while_read):
    checkpoint = write_checkpoint(run, 5)
    dropped_while_read(checkpoint)
    with pytest.raises(CheckpointError, match=r"removed while it was read, as train\.keep_checkpoints .*; use a newer"):
        read_manifest(checkpoint)


def test_when_the_newest_is_dropped_while_it_is_read_a_newer_one_is_found(run, dropped_while_read):
    write_checkpoint(run, 5)
    dropped_while_read(write_checkpoint(run, 10), lambda: write_checkpoint(run, 15))
    found, manifest, skipped = newest_checkpoint(run)
    assert (found.name, manifest.step, skipped) == ("step_00000015.1", 15, [])


def test_a_manifest_of_before_knows_no_ends(run):
    path = write_checkpoint(run, 5) / "manifest.json"
    tree = json.loads(path.read_text())
    assert tree.pop("ends") == []
    path.write_text(json.dumps(tree))
    assert read_manifest(path.parent).ends == []


def test_if_all_are_damaged_training_does_not_silently_begin_anew(run):
    (write_checkpoint(run, 5) / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError):
        newest_checkpoint(run)


@pytest.mark.parametrize(("loss", "perplexity"), [(0.0, 1.0), (700.0, math.exp(700)), (710.0, None), (None, None)])
def test_a_perplexity_is_a_number_or_none(loss, perplexity):
    assert metrics.perplexity(loss) == perplexity
    assert loss is None or Score(nats=10 * loss, tokens=10, text_bytes=1).perplexity == perplexity


def test_a_run_that_was_moved_with_its_checkout_names_folders_where_they_are_now(tmp_path):
    spec = tiny_spec(tmp_path / "old", data={"tokenizer": "tokenizer.json"})
    run = create_run(spec)
    assert run.spec() == spec
    (tmp_path / "old").rename(tmp_path / "new")
    moved = RunDir(tmp_path / "new" / run.path.relative_to(tmp_path / "old"))
    found = moved.spec()
    assert found == tiny_spec(tmp_path / "new", data={"tokenizer": "tokenizer.json"})
    (tmp_path / "old").mkdir()  # a copy: what the spec names is still there
    assert moved.spec() == spec
