"""Tests of the benchmark `ingest` on data that `mhmoe data prepare` prepared."""

from importlib.util import find_spec

import pytest

from mhmoe_ray.data.shards.manifest import read_data_manifest
from mhmoe_ray.data.shards.recipe import recipe
from mhmoe_ray.spec import dump_spec, load_resolved_spec
from mhmoe_ray.storage import write_json
from tests.bench.conftest import write_spec
from tests.benchmarks import ingest
from tests.benchmarks.ingest import CONTESTANTS, OUR_CONTESTANTS, ratio_to_ours
from tests.benchmarks.process import run_benchmark
from tests.cli.run import assert_one_line
from tests.data.shards.manifests import make_manifest
from tests.data.texts import write_lines
from tests.support.specs import tiny_spec

PEER_CONTESTANTS = [name for name in CONTESTANTS if name not in OUR_CONTESTANTS]


@pytest.mark.slow  # test_rounds_alternate_order_and_ratios_are_per_round tests the figures
@pytest.mark.ray
def test_ingest_measures_whole_preparation_and_stream(project):
    previous_files = sorted(project.rglob("*"))
    result = run_benchmark(project, "ingest", "spec.yaml", "--peers", "--rounds", "1", "--json")
    figures = result.json()["figures"]
    domains = read_data_manifest(project / "prepared").domains.values()
    tokens, text = sum(d.tokens + d.validation_tokens for d in domains), sum(d.text_bytes for d in domains)
    for prepare_round in figures["prepare: mhmoe"]["rounds"]:
        assert (prepare_round["tokens"], prepare_round["text_bytes"]) == (tokens, text)
        assert prepare_round["seconds"] > 0
        assert 0 < prepare_round["own_bytes"] <= prepare_round["peak_bytes"]
    for stream_round in figures["stream: mhmoe"]["rounds"]:
        # The clock starts at the first of 20 * 4 micro-batches, so that micro-batch does not count.
        assert stream_round["micro_batches"] == 20 * 4 - 1
    assert [len(f["rounds"]) for f in figures.values()] == [1] * len(figures)
    missing_peers = [name for name in PEER_CONTESTANTS if find_spec(CONTESTANTS[name].package) is None]
    # The bare pool decodes images, which this spec does not have.
    assert set(figures) == set(CONTESTANTS) - {*missing_peers, "stream: a bare pool"}
    for name in missing_peers:
        assert f"{name} is not measured: {CONTESTANTS[name].package} is not installed" in result.err
    for part in ("tokens/s", "micro-batches/s", "time to ours", "1 rounds in turn"):
        assert part in result.err
    assert sorted(project.rglob("*")) == previous_files


def test_rounds_alternate_order_and_ratios_are_per_round(monkeypatch):
    seconds = iter([2.0, 3.0, 8.0, 2.0, 1.0, 5.0])
    monkeypatch.setattr(ingest, "run_in_process", lambda *_: {"seconds": next(seconds)})
    lines = []
    names = ["prepare: mhmoe", "prepare: datasets"]
    rounds_by_name = ingest.run_contest(tiny_spec(), names, 3, 1, lines.append)
    assert [line.split(" took")[0] for line in lines] == [
        f"round {n}: {name}" for n, order in ((1, names), (2, names[::-1]), (3, names)) for name in order
    ]
    assert [result["seconds"] for result in rounds_by_name["prepare: mhmoe"]] == [2, 2, 1]
    # The ratios of the three rounds are 3 / 2, 8 / 2 and 5 / 1 for the peer; their median is 4.
    assert [ratio_to_ours(name, rounds_by_name) for name in names] == [1, 4]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.skipif(find_spec("datasets") is None, reason="datasets is not installed")
def test_datasets_prepares_as_many_tokens_except_batch_ends(project):
    spec = load_resolved_spec(project / "spec.yaml")
    figures = run_benchmark(project, "ingest", "spec.yaml", "--peers", "--rounds", "1", "--json").json()["figures"]
    our_tokens, *peer_tokens = (f["rounds"][0]["tokens"] for name, f in figures.items() if name.startswith("prepare"))
    # datasets packs each batch of up to 1,000 documents separately and drops the incomplete sample at its end, in each
    # of two processes. Therefore it may have fewer tokens than our preparation.
    end_tokens = 2 * spec.data.seq_len * 2
    assert all(our_tokens - end_tokens <= tokens <= our_tokens for tokens in peer_tokens)
    assert len(peer_tokens) == 2


@pytest.mark.slow  # tests/cli/test_errors.py tests the errors of preparations
@pytest.mark.ray
def test_failure_is_one_line_with_cause(tmp_path):
    """If a preparation fails, the command prints one line that names the contestant and the cause."""
    spec = write_spec(tmp_path)
    write_lines(tmp_path / "raw/a/one.jsonl", [b"no json"])
    # A manifest without shards is enough here, because preparation is measured first and fails before any shard is
    # read.
    spec.data.prepared.mkdir()
    write_json(spec.data.prepared / "manifest.json", make_manifest({"web/a": 4}, recipe(spec)).model_dump(mode="json"))
    result = run_benchmark(tmp_path, "ingest", "spec.yaml", "--rounds", "1")
    assert_one_line(result, 9, "ingest, prepare: mhmoe", "DataError")


@pytest.mark.slow
def test_ingest_requires_tokenizer_and_prepared_data(tmp_path):
    spec = tmp_path / "spec.yaml"
    spec.write_text(dump_spec(tiny_spec(tmp_path)))
    assert_one_line(run_benchmark(tmp_path, "ingest", "spec.yaml"), 3, "the spec has no data.tokenizer")
    spec.write_text(dump_spec(tiny_spec(tmp_path, data={"tokenizer": "tokenizer.json"})))
    assert_one_line(run_benchmark(tmp_path, "ingest", "spec.yaml"), 4, "it is not there", "mhmoe data prepare SPEC")
