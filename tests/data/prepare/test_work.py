"""Leftovers of preparations beside a prepared folder, without Ray."""

import os

from mhmoe_ray.data.prepare import work
from mhmoe_ray.data.prepare.pipeline import prepare
from mhmoe_ray.data.prepare.work import ALIVE, Workplace, at_work, clear, read_progress, shared_folder
from mhmoe_ray.data.shards.manifest import recipe
from mhmoe_ray.storage import write_json
from tests.data.shards.manifests import manifest_of
from tests.specs import tiny_spec
from tests.watch import wait_until


def test_leftovers_of_another_folder_stay(tmp_path):
    for name in ("prep[12].partial-a", "prep[12].partial-b", "prep1.partial-a", "prep[12]", "prep[12].other"):
        (tmp_path / name / "parts").mkdir(parents=True)
    clear(tmp_path / "prep[12]")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prep1.partial-a", "prep[12]", "prep[12].other"]


def test_what_a_job_left_that_was_killed_when_all_was_done_is_taken_away(tmp_path):
    """The job was killed between the rename and the end, where a follower would be shown a running preparation
    forever."""
    spec = tiny_spec(tmp_path)
    made = manifest_of({"web/a": 4}, recipe(spec))
    with at_work(spec) as place:
        (place.shared / "progress.json").write_text(
            '{"stage": "finishing", "done": 1, "total": 1, "documents": 1, "tokens": 1, "found_tokens": 0, '
            '"bytes_per_s": 0.0, "seconds_left": null}'
        )
        assert read_progress(shared_folder(spec))
        write_json(place.result / "manifest.json", made.model_dump(mode="json"))
        place.result.rename(spec.data.prepared)
        assert prepare(spec) == made
    assert read_progress(shared_folder(spec)) is None
    assert list(tmp_path.iterdir()) == [spec.data.prepared]


def test_what_jobs_left_that_are_dead_is_taken_away_and_what_is_alive_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(work, "ALIVE_SECONDS", 0.05)
    spec = tiny_spec(tmp_path)
    with at_work(spec) as one, at_work(spec) as other:
        shared = one.shared
        one.parts.mkdir()
        dead = left_by_the_dead(shared)
        wait_until(lambda: not dead.exists(), "its removal")
        for _ in range(2):  # between two signs of life each job looks around once
            for job in (one, other):
                sign = job.own / ALIVE
                seen = sign.stat().st_mtime_ns
                wait_until(lambda sign=sign, seen=seen: sign.stat().st_mtime_ns > seen, "its next sign of life")
        assert {path.name for path in shared.iterdir()} == {one.own.name, other.own.name, "parts"}
    assert [path.name for path in shared.iterdir()] == ["parts"]


def test_who_was_silent_for_long_is_dead_unless_all_have_been(tmp_path):
    """A machine or storage that stood still makes all others look dead to the first process that goes on."""
    place = Workplace(tmp_path, tmp_path / "own")
    place.own.mkdir()
    (place.own / ALIVE).touch()
    silent = left_by_the_dead(place.shared)
    seen = work._look_around(place, {})
    os.utime(silent / ALIVE, (1, 1))
    seen = work._look_around(place, seen)
    assert silent.exists(), "it gave a sign since"
    os.utime(place.own / ALIVE, (0, 0))
    seen = work._look_around(place, seen)
    assert silent.exists(), "we were as silent"
    work._look_around(place, seen)
    assert not silent.exists()


def left_by_the_dead(shared):
    dead = shared / "dead"
    (dead / "prepared" / "train").mkdir(parents=True)
    (dead / ALIVE).touch()
    os.utime(dead / ALIVE, (0, 0))
    return dead
