"""`mhmoe bench ingest` on data that the command itself prepared."""

from importlib.util import find_spec

import pytest

from mhmoe_ray.bench import ingest
from mhmoe_ray.bench.ingest import CONTESTANTS, OURS
from mhmoe_ray.data.shards.manifest import read_data_manifest, recipe
from mhmoe_ray.spec import dump_spec, load_resolved_spec
from mhmoe_ray.storage import write_json
from tests.bench.conftest import write_spec
from tests.cli.run import assert_one_line, mhmoe_anew
from tests.data.shards.manifests import manifest_of
from tests.data.texts import write_lines
from tests.specs import tiny_spec

PEERS = [name for name in CONTESTANTS if name not in OURS]


@pytest.mark.slow  # below is a quicker one of the command's way into a process and out again
@pytest.mark.ray
def test_both_tasks_are_done_anew_and_whole(project):
    before = sorted(project.rglob("*"))
    shown = mhmoe_anew(project, "bench", "ingest", "spec.yaml", "--peers", "--rounds", "1", "--json")
    found = shown.json()["figures"]
    domains = read_data_manifest(project / "prepared").domains.values()
    tokens, text = sum(d.tokens + d.validation_tokens for d in domains), sum(d.text_bytes for d in domains)
    for prepared in found["prepare: mhmoe"]["rounds"]:
        assert (prepared["tokens"], prepared["text_bytes"]) == (tokens, text)
        assert prepared["seconds"] > 0
        assert 0 < prepared["own_bytes"] <= prepared["peak_bytes"]
    for streamed in found["stream: mhmoe"]["rounds"]:
        assert streamed["micro_batches"] == 20 * 4 - 1  # of 20 steps; the first starts the clock
    assert [len(f["rounds"]) for f in found.values()] == [1] * len(found)
    missing = [name for name in PEERS if find_spec(CONTESTANTS[name].package) is None]
    assert set(found) == set(CONTESTANTS) - set(missing)
    for name in missing:
        assert f"{name} is not measured: {CONTESTANTS[name].package} is not installed" in shown.err
    for part in ("tokens/s", "micro-batches/s", "time to ours", "1 rounds in turn"):
        assert part in shown.err
    assert sorted(project.rglob("*")) == before


def test_every_other_round_is_in_reverse_order_and_ratios_are_by_round(monkeypatch):
    seconds = iter([2.0, 3.0, 8.0, 2.0, 1.0, 5.0])
    monkeypatch.setattr(ingest, "run_apart", lambda *_: {"seconds": next(seconds)})
    told = []
    names = ["prepare: mhmoe", "prepare: datasets"]
    ours, theirs = ingest.contest(tiny_spec(), names, 3, 1, told.append)
    assert [line.split(" took")[0] for line in told] == [
        f"round {n}: {name}" for n, order in ((1, names), (2, names[::-1]), (3, names)) for name in order
    ]
    assert [f["seconds"] for f in ours.rounds] == [2, 2, 1]
    assert (ours.to_ours, theirs.to_ours) == (1, 4)  # of 1.5, 4 and 5


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.skipif(find_spec("datasets") is None, reason="datasets is not installed")
def test_datasets_makes_as_many_samples_but_for_ends(project):
    spec = load_resolved_spec(project / "spec.yaml")
    found = mhmoe_anew(project, "bench", "ingest", "spec.yaml", "--peers", "--rounds", "1", "--json").json()["figures"]
    ours, *theirs = (f["rounds"][0]["tokens"] for name, f in found.items() if name.startswith("prepare"))
    ends = 2 * spec.data.seq_len * 2  # of batches of 1,000 documents in each of two processes
    assert all(ours - ends <= tokens <= ours for tokens in theirs)
    assert len(theirs) == 2


@pytest.mark.ray
def test_what_fails_is_one_line_with_its_cause(tmp_path):
    """The failure comes before the stream task, the only one that reads prepared data, so a manifest without shards is
    enough here."""
    spec = write_spec(tmp_path)
    write_lines(tmp_path / "raw/a/one.jsonl", [b"no json"])
    spec.data.prepared.mkdir()
    write_json(spec.data.prepared / "manifest.json", manifest_of({"web/a": 4}, recipe(spec)).model_dump(mode="json"))
    shown = mhmoe_anew(tmp_path, "bench", "ingest", "spec.yaml", "--rounds", "1")
    assert_one_line(shown, 9, "bench ingest, prepare: mhmoe", "DataError")


@pytest.mark.slow
def test_it_needs_a_given_tokenizer_and_prepared_data(tmp_path):
    spec = tmp_path / "spec.yaml"
    spec.write_text(dump_spec(tiny_spec(tmp_path)))
    assert_one_line(mhmoe_anew(tmp_path, "bench", "ingest", "spec.yaml"), 3, "the spec has no data.tokenizer")
    spec.write_text(dump_spec(tiny_spec(tmp_path, data={"tokenizer": "tokenizer.json"})))
    assert_one_line(
        mhmoe_anew(tmp_path, "bench", "ingest", "spec.yaml"), 4, "it is not there", "mhmoe data prepare SPEC"
    )
