"""Tests of `mhmoe bench run`, in which a run and a bare loop train to the same loss."""

import pytest

from mhmoe_ray.bench import run as bench
from mhmoe_ray.cli.bench import run
from mhmoe_ray.errors import DataError, JobError, SpecError
from mhmoe_ray.spec import dump_spec
from tests.cli.run import mhmoe_subprocess
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
    for part in ("a run keeps ", "tokens/s", "waits for data", f"all end at loss {ray_run['loss']:.4f}"):
        assert part in result.err
    assert sorted(project.rglob("*")) == previous_files


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
