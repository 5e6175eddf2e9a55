"""What preparations leave beside a prepared folder, without Ray."""

import os

from mhmoe_ray.data.prepare import work
from mhmoe_ray.data.prepare.pipeline import prepare
from mhmoe_ray.data.prepare.progress import read_progress
from mhmoe_ray.data.prepare.work import ALIVE, clear, make_workplace, shared_folder
from mhmoe_ray.data.shards.manifest import recipe
from mhmoe_ray.runs.files import write_json
from tests.data.shards.manifests import manifest_of
from tests.specs import tiny_spec
from tests.watch import wait_until


def test_leftovers_of_another_folder_stay(tmp_path):
    for name in ("prep[12].partial-a", "prep[12].partial-b", "prep1.partial-a", "prep[12]", "prep[12].other"):
        (tmp_path / name / "parts").mkdir(parents=True)
    clear(tmp_path / "prep[12]")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prep1.partial-a", "prep[12]", "prep[12].other"]


def test_what_a_job_left_that_was_killed_when_all_was_done_is_taken_away(tmp_path):
    """Between the rename and the end, so that who follows would be shown a preparation for ever."""
    spec = tiny_spec(tmp_path)
    place = make_workplace(spec)
    (place.shared / "progress.json").write_text(
        '{"stage": "finishing", "done": 1, "total": 1, "documents": 1, "tokens": 1, "found_tokens": 0, '
        '"bytes_per_s": 0.0, "seconds_left": null}'
    )
    assert read_progress(shared_folder(spec))
    made = manifest_of({"web/a": 4}, recipe(spec))
    write_json(place.result / "manifest.json", made.model_dump(mode="json"))
    place.result.rename(spec.data.prepared)
    assert prepare(spec) == made
    assert read_progress(shared_folder(spec)) is None
    assert list(tmp_path.iterdir()) == [spec.data.prepared]


def test_what_jobs_left_that_are_dead_is_taken_away_and_what_is_alive_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(work, "ALIVE_SECONDS", 0.05)
    spec = tiny_spec(tmp_path)
    jobs = make_workplace(spec), make_workplace(spec)
    shared = jobs[0].shared
    jobs[0].parts.mkdir()
    (shared / "dead" / "prepared" / "train").mkdir(parents=True)
    (shared / "dead" / ALIVE).touch()
    os.utime(shared / "dead" / ALIVE, (0, 0))
    wait_until(lambda: not (shared / "dead").exists(), "the dead one's removal")
    for _ in range(2):  # between two signs of life each job looks around once
        for job in jobs:
            seen = (job.own / ALIVE).stat().st_mtime_ns
            wait_until(lambda job=job, seen=seen: (job.own / ALIVE).stat().st_mtime_ns > seen, "its next sign of life")
    assert {path.name for path in shared.iterdir()} == {jobs[0].own.name, jobs[1].own.name, "parts"}
