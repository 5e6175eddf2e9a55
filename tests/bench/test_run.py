"""Tests of `mhmoe bench run`, in which a run, a bare loop and transformers' model train to the same loss."""

import pytest

from mhmoe_ray.api.spec import load_spec
from mhmoe_ray.bench import loops
from mhmoe_ray.bench import run as bench
from mhmoe_ray.cli.bench import run
from mhmoe_ray.errors import DataError, JobError, SpecError
from mhmoe_ray.spec import dump_spec
from tests.cli.run import mhmoe, mhmoe_subprocess
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


DENSE = ["model.moe=null"]
MIXTURE = ["model.d_ff=null", "model.moe={experts: 4, top_k: 2, d_expert: 24, every: 1, normalize_gates: true}"]


@pytest.mark.long
@pytest.mark.ray  # for the prepared data
@pytest.mark.parametrize(
    ("overrides", "tolerance"),
    # transformers computes the load balancing loss over all layers together, so that the router's gradients differ.
    [(DENSE, 1e-6), ([*DENSE, "data.packing=best_fit"], 1e-6), (MIXTURE, 1e-3)],
    ids=["dense", "padded", "mixture"],
)
def test_transformers_in_plain_loop_ends_with_our_loss(project, tmp_path, overrides, tolerance):
    if "data.packing=best_fit" in overrides:
        overrides = [*overrides, f"data.prepared={tmp_path / 'padded'}"]
        assert mhmoe(project, "data", "prepare", "spec.yaml", *(f"--set={o}" for o in overrides)).code == 0
    spec = load_spec(project / "spec.yaml", overrides)
    expected_loss = loops.measure_loop(spec, tmp_path, 1)["loss"]
    measurements = loops.transformers_measurements(spec)
    assert len(measurements) == (2 if spec.model.moe else 1)
    for measurement in measurements.values():
        result = measurement(spec, tmp_path, 1)
        assert result["loss"] == pytest.approx(expected_loss, rel=tolerance)
        assert result["seconds"] > 0


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
