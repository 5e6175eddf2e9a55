"""`mhmoe bench run`: a run and a bare loop train to the same loss."""

import pytest

from mhmoe_ray.bench import run as bench
from mhmoe_ray.errors import JobError, SpecError
from mhmoe_ray.spec import dump_spec
from tests.cli.run import assert_one_line, mhmoe_anew
from tests.specs import tiny_spec


@pytest.mark.slow  # what it compares is held against one process in tests/train, and the rest of it below
@pytest.mark.ray
def test_a_run_and_a_loop_end_with_the_same_loss(project):
    before = sorted(project.rglob("*"))
    shown = mhmoe_anew(project, "bench", "run", "spec.yaml", "--threads", "1", "--rounds", "1", "--json")
    found = shown.json()
    [run], [loop], [settled] = found["run"], found["loop"], found["settled"]
    assert run["loss"] == loop["loss"] == settled["loss"] > 0
    assert found["kept"] == loop["seconds"] / run["seconds"]
    assert found["kept_of_settled"] == settled["seconds"] / run["seconds"]
    assert 0 <= run["data_wait"] < 1
    assert (found["steps"], found["tokens"]) == (20 - bench.WARM_UP, (20 - bench.WARM_UP) * 4 * 2 * 16)
    for part in ("a run keeps 0.", "tokens/s", "waits for data", f"all end at loss {run['loss']:.4f}"):
        assert part in shown.err
    assert sorted(project.rglob("*")) == before


def test_losses_that_differ_are_an_error(monkeypatch):
    results = iter([{"seconds": 1.0, "loss": loss} for loss in (2.0, 2.0, 2.5)])
    monkeypatch.setattr(bench, "run_apart", lambda *_, **__: next(results))
    with pytest.raises(JobError, match="losses differ"):
        bench.measure(tiny_spec(), 1, 1, lambda _: None)


def test_a_training_of_a_few_steps_is_refused():
    with pytest.raises(SpecError, match=r"train\.steps is 10, and 10 are not timed"):
        bench.measure(tiny_spec(train={"steps": bench.WARM_UP}), 1, 1, lambda _: None)


def test_it_needs_prepared_data(tmp_path):
    (tmp_path / "spec.yaml").write_text(dump_spec(tiny_spec(tmp_path)))
    result = mhmoe_anew(tmp_path, "bench", "run", "spec.yaml")
    assert_one_line(result, 4, "it is not there", "mhmoe data prepare SPEC")
