"""Tests of `mhmoe bench run`, in which a run, a bare loop and transformers' model train to the same loss."""

from pathlib import Path

import numpy as np
import pytest

from mhmoe_ray.bench import loops
from mhmoe_ray.bench import run as bench
from mhmoe_ray.cli.bench import run
from mhmoe_ray.data.shards.columns import TOKENS, padding_token
from mhmoe_ray.data.shards.files import to_batch, write_shard
from mhmoe_ray.data.shards.manifest import TOKENIZER_FILE
from mhmoe_ray.data.sources import find_files
from mhmoe_ray.data.tokenizer import train_tokenizer
from mhmoe_ray.errors import DataError, JobError, SpecError
from mhmoe_ray.spec import dump_spec
from tests.cli.run import mhmoe_subprocess
from tests.data.shards.manifests import make_manifest
from tests.data.texts import write_corpus
from tests.support.specs import tiny_spec


@pytest.mark.slow  # the quick tests are those below, and tests/train, which compares ranks with one process
@pytest.mark.ray
def test_run_and_loop_end_with_same_loss(project):
    previous_files = sorted(project.rglob("*"))
    result = mhmoe_subprocess(project, "bench", "run", "spec.yaml", "--threads", "1", "--rounds", "1", "--json")
    output = result.json()
    [ray_run], [loop], [settled] = output["run"], output["loop"], output["settled"]
    assert ray_run["loss"] == loop["loss"] == settled["loss"] > 0
    assert output["kept"] == loop["seconds"] / ray_run["seconds"]
    assert output["kept_of_settled"] == settled["seconds"] / ray_run["seconds"]
    assert 0 <= ray_run["data_wait"] < 1
    assert (output["steps"], output["tokens"]) == (20 - bench.WARM_UP_STEPS, (20 - bench.WARM_UP_STEPS) * 4 * 2 * 16)
    for part in ("a run keeps ", "tokens/s", "waits for data", f"{ray_run['loss']:.4f}"):
        assert part in result.err
    assert sorted(project.rglob("*")) == previous_files


MIXTURE = {
    "d_ff": None,
    "moe": {"heads": 1, "experts": 4, "top_k": 2, "d_expert": 24, "every": 1, "normalize_gates": True},
}


@pytest.mark.long
@pytest.mark.parametrize(
    ("model", "packing", "tolerance"),
    # transformers computes the load balancing loss over all layers together, so that the router's gradients differ.
    [({"moe": None}, "concat", 1e-6), ({"moe": None}, "best_fit", 1e-6), (MIXTURE, "concat", 1e-3)],
    ids=["dense", "padded", "mixture"],
)
def test_transformers_in_plain_loop_ends_with_our_loss(tmp_path, model, packing, tolerance):
    spec = tiny_spec(tmp_path, model=model, data={"packing": packing})
    _write_samples(spec)
    expected_loss = loops.measure_loop(spec, tmp_path, 1)["loss"]
    measurements = loops.transformers_measurements(spec)
    assert len(measurements) == (2 if spec.model.moe else 1)
    for measurement in measurements.values():
        result = measurement(spec, tmp_path, 1)
        assert result["loss"] == pytest.approx(expected_loss, rel=tolerance)
        assert result["seconds"] > 0


def _write_samples(spec):
    """Write a tokenizer and 64 random samples to the prepared folder; with packing best_fit, half have padding."""
    write_corpus(Path(spec.data.sources["web"].path))
    tokenizer, folder = train_tokenizer(find_files(spec.data), spec.data, spec.model.vocab_size), spec.data.prepared
    folder.mkdir()
    tokenizer.save(str(folder / TOKENIZER_FILE))
    rows = np.random.default_rng(0).integers(0, 256, (64, spec.data.seq_len + 1)).astype(np.uint16)
    if spec.data.packing == "best_fit":
        rows[::2, 10:] = padding_token(2)
    shard = write_shard(folder, "train/web/a/00000.arrow", to_batch({TOKENS: rows}))
    manifest = make_manifest({"web/a": len(rows)})
    domains = {name: domain.model_copy(update={"shards": [shard]}) for name, domain in manifest.domains.items()}
    (folder / "manifest.json").write_text(manifest.model_copy(update={"domains": domains}).model_dump_json())


def test_peers_need_transformers(monkeypatch):
    monkeypatch.setattr(loops, "installed_version", lambda _: None)
    with pytest.raises(SpecError, match=r"transformers is not installed: pip install 'transformers>=5\.16'"):
        bench.measure(tiny_spec(), 1, 1, lambda _: None, peers=True)


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"moe": None, "document_masks": True},
        {"moe": None, "dropout": 0.1},
        {"d_ff": None, "moe": {"experts": 4, "top_k": 2, "d_expert": 24, "every": 1, "capacity_factor": 1.0}},
    ],
)
def test_peers_need_a_model_that_transformers_trains(model):
    with pytest.raises(SpecError, match="transformers trains no model of the spec's options"):
        bench.measure(tiny_spec(model=model), 1, 1, lambda _: None, peers=True)


def test_fastest_peer_is_compared_round_by_round():
    seconds = {"run": [2.0, 4.0, 2.0], "loop": [1.0, 1.0, 1.0], "settled": [1.0, 1.0, 1.0]}
    peer_seconds = {"eager": [3.0, 3.0, 3.0], "grouped_mm": [1.0, 5.0, 2.5]}
    results = {n: [{"seconds": s} for s in values] for n, values in (seconds | peer_seconds).items()}
    figures = bench.LoopFigures(results)
    assert figures.fastest_peer == "grouped_mm"
    assert figures.throughput_ratios("grouped_mm") == [0.5, 1.25, 1.25]
    assert bench.LoopFigures({n: results[n] for n in seconds}).fastest_peer is None


def test_different_losses_are_an_error(monkeypatch):
    results = iter([{"seconds": 1.0, "loss": loss} for loss in (2.0, 2.0, 2.5)])
    monkeypatch.setattr(bench, "run_in_process", lambda *_, **__: next(results))
    with pytest.raises(JobError, match="losses differ"):
        bench.measure(tiny_spec(), 1, 1, lambda _: None)


def test_too_few_steps_are_refused():
    with pytest.raises(SpecError, match=r"train\.steps is 10, and 10 are not timed"):
        bench.measure(tiny_spec(train={"steps": bench.WARM_UP_STEPS}), 1, 1, lambda _: None)


def test_bench_run_requires_prepared_data(tmp_path):
    (tmp_path / "spec.yaml").write_text(dump_spec(tiny_spec(tmp_path)))
    with pytest.raises(DataError, match="it is not there; run: mhmoe data prepare SPEC"):
        run(tmp_path / "spec.yaml")
