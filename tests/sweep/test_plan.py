"""Tests of the runs that sweeps plan: the sweeps in jobs/paper, and sweeps that the tests write."""

from pathlib import Path

import pytest
import yaml

from mhmoe_ray.errors import SpecError
from mhmoe_ray.planner.sizes import compute_sizes
from mhmoe_ray.spec import SweepSpec, load_sweep
from mhmoe_ray.sweep.plan import planned_runs, start_names
from tests.support.specs import tiny_spec

PAPER = Path(__file__).parents[2] / "jobs/paper"
SWEEPS = sorted(path for path in PAPER.glob("*.yaml") if "\nsizes:" in path.read_text())


def planned_specs(name, size):
    """Return the spec of each variant of a sweep in jobs/paper at size `size`, by the name of the variant."""
    path = PAPER / f"{name}.yaml"
    return {run.variant: run.spec for run in planned_runs(load_sweep(path), PAPER, size)}


@pytest.mark.parametrize("size", ["small", "paper"])
@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_the_sweeps_of_the_papers_can_be_planned_at_both_sizes(path, size):
    sweep = load_sweep(path)
    runs = planned_runs(sweep, path.parent, size)
    assert sweep.name == path.stem
    assert len(runs) == len({run.name for run in runs}) >= 2
    gpus = {run.spec.cluster.gpus_per_worker for run in runs}
    assert gpus == {0 if size == "small" else 1}


def test_small_models_have_a_quarter_of_the_papers_width():
    small, paper = planned_specs("follow-up", "small"), planned_specs("follow-up", "paper")
    for name, spec in paper.items():
        small_model = small[name].model
        assert 4 * small_model.d_model == spec.model.d_model
        assert (small_model.moe and 4 * small_model.moe.d_expert) == (spec.model.moe and spec.model.moe.d_expert)
        assert (small_model.moe and small_model.moe.experts) == (spec.model.moe and spec.model.moe.experts)


def test_the_first_papers_small_models_are_equal_in_parameters():
    small = planned_specs("heads", "small")
    base = compute_sizes(small["xmoe"].model).parameters
    ratios = {name: compute_sizes(spec.model).parameters / base for name, spec in small.items()}
    assert all(0.998 < ratio <= 1 for ratio in ratios.values()), ratios
    assert small["h4"].model.moe.router == "xmoe_torchscale"


def test_plan_combines_runs_grid_and_seeds_seed_by_seed(tmp_path):
    (tmp_path / "base.yaml").write_text((PAPER / "small.yaml").read_text())
    sweep = SweepSpec.model_validate(
        {
            "name": "both",
            "sizes": {"only": {"spec": "base.yaml", "set": {"train.steps": 7}, "runs": {"a": {"train.lr": 0.5}}}},
            "runs": {"a": {"preset": "p2-mhmoe-h2"}, "b": {"preset": "p2-smoe", "train.lr": 0.25}},
            "grid": {"model.moe.z_weight": [0.0, 0.1]},
            "seeds": [3, 4],
        }
    )
    runs = planned_runs(sweep, tmp_path, "only", ["train.warmup_steps=1"])
    assert [run.name for run in runs[:4]] == [f"{v}-z-weight-{z}-s3" for v in "ab" for z in ("0-0", "0-1")]
    assert {run.seed for run in runs[4:]} == {4}
    first_spec, last_spec = runs[0].spec, runs[-1].spec
    assert (first_spec.name, first_spec.seed, first_spec.train.steps, first_spec.train.lr) == (
        "both-a-z-weight-0-0-s3",
        3,
        7,
        0.5,
    )
    assert (last_spec.seed, last_spec.train.lr, last_spec.model.moe.z_weight, last_spec.train.warmup_steps) == (
        4,
        0.25,
        0.1,
        1,
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"runs": {}, "grid": {}}, "there is nothing to vary"),
        ({"grid": {"train.lr": []}}, "grid has no value for train.lr"),
        ({"seeds": [1, 1]}, "a seed is given twice"),
        ({"sizes": {"s": {"spec": "x", "only": ["c"]}}}, "names the run 'c'"),
        ({"grid": {"seed": [1, 2]}}, "seed of each run is set by the sweep: use seeds"),
        ({"runs": {"a": {"name": "b"}}}, "name of each run is set by the sweep"),
        ({"sizes": {"s": {"spec": "x", "set": {"seed": 1}}}}, "seed of each run"),
        (
            {"sizes": {"s": {"spec": "x", "runs": {"a": {"storage": "b"}}}}},
            "storage must be the same for all runs of a sweep",
        ),
    ],
)
def test_invalid_sweeps_are_rejected(change, reason):
    good = {"name": "n", "sizes": {"s": {"spec": "x"}}, "runs": {"a": {}}}
    with pytest.raises(ValueError, match=reason):
        SweepSpec.model_validate({**good, **change})


def test_a_seed_on_the_command_line_is_refused():
    with pytest.raises(SpecError, match="override seed: seed of each run is set by the sweep; use seeds"):
        planned_runs(load_sweep(PAPER / "heads.yaml"), PAPER, "small", ["seed=3"])


def test_a_mistake_in_a_run_names_the_run():
    sweep = load_sweep(PAPER / "heads.yaml", ["runs.h5.preset=p1-mhmoe-8-h5"])
    with pytest.raises(SpecError, match="sweep heads, run h5: preset p1-mhmoe-8-h5: there is no such preset"):
        planned_runs(sweep, PAPER, "small")


def test_too_long_names_of_a_grid_are_shortened():
    grid = {"train.precision": ["float32", "bfloat16"], "model.moe.d_expert": [24, 48], "model.moe.experts": [16, 32]}
    sweep = SweepSpec.model_validate(
        {"name": "a-long-name-of-sweeps", "sizes": {"small": {"spec": "small.yaml"}}, "grid": grid, "seeds": [0, 1000]}
    )
    runs = planned_runs(sweep, PAPER, "small")
    names = {run.spec.name for run in runs}
    assert len(names) == 16
    assert names == {f"a-long-name-of-sweeps-{run.name}" for run in runs}
    assert max(map(len, names)) <= 41


def write_branching_sweep(folder, runs):
    """Write the spec of a dense model, and return a sweep whose runs vary this spec as `runs` says, with two seeds."""
    spec = tiny_spec(folder, model={"moe": None}).model_dump(mode="json")
    (folder / "dense.yaml").write_text(yaml.safe_dump(spec))
    return SweepSpec.model_validate(
        {"name": "n", "sizes": {"s": {"spec": "dense.yaml"}}, "runs": runs, "seeds": [0, 1]}
    )


def test_runs_may_start_from_other_runs_of_the_sweep(tmp_path):
    """The order of the runs in the file does not matter, and a run starts from the run with its own seed."""
    sweep = write_branching_sweep(
        tmp_path,
        {
            "mix": {"start": {"from": ["sweep:left", "sweep:right"], "how": "mix"}, "model.moe": {"top_k": 2}},
            "left": {"start.from": "sweep:dense", "start.optimizer": True},
            "right": {"start.from": "sweep:dense@10", "train.lr": 0.1},
            "dense": {},
        },
    )
    runs = {run.name: run for run in planned_runs(sweep, tmp_path, "s")}
    assert start_names(runs["mix-s1"]) == ["left-s1", "right-s1"]
    assert start_names(runs["left-s0"]) == start_names(runs["right-s0"]) == ["dense-s0"]
    assert runs["mix-s0"].spec.model.moe.experts == 2
    assert runs["mix-s0"].spec.model.moe.d_expert == 48
    assert runs["right-s0"].spec.model == runs["dense-s0"].spec.model
    # All runs read the same prepared folder, whose tokenizer is trained once.
    assert {run.spec.data.tokenizer for run in runs.values()} == {None}


@pytest.mark.parametrize(
    ("runs", "reason"),
    [
        ({"a": {"start.from": "sweep:b"}}, "start.from sweep:b: it has no such run; choose from a"),
        ({"a": {"start.from": "sweep:b"}, "b": {"start.from": "sweep:a"}}, "it starts, directly or not, from the run"),
        ({"a": {"start.from": "sweep:b", "model.d_model": 64}, "b": {}}, "model.d_model is 64 here and 32 there"),
    ],
)
def test_impossible_starts_within_a_sweep_are_named(tmp_path, runs, reason):
    with pytest.raises(SpecError) as error:
        planned_runs(write_branching_sweep(tmp_path, runs), tmp_path, "s")
    assert reason in str(error.value)


def test_an_override_does_not_undo_a_null_of_a_run(tmp_path):
    """The override is refused, because the run from new weights would start from the model that the override names."""
    runs = {"dense": {}, "branch": {"start.from": "sweep:dense"}, "scratch": {"start": None}}
    sweep = write_branching_sweep(tmp_path, runs)
    assert len(planned_runs(sweep, tmp_path, "s")) == 3 * len(sweep.seeds)
    with pytest.raises(SpecError, match=r"override start\.from: its run scratch has start: null, which this"):
        planned_runs(sweep, tmp_path, "s", ["start.from=other"])
