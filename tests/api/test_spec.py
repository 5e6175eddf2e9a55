"""Tests of specs that come from a file or a mapping, with overrides."""

from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import yaml

import mhmoe_ray as mh
from mhmoe_ray.api.spec import override_list
from mhmoe_ray.errors import SpecError
from mhmoe_ray.spec import parse_overrides
from tests.checkpoint.huggingface.conftest import MODELS, make_run

TREE = {
    "name": "own",
    "preset": "mhmoe",
    "size": "tiny",
    "data": {"sources": {"web": {"path": "raw"}}, "prepared": "prepared"},
}


def test_a_mapping_gives_the_spec_of_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").write_text(yaml.safe_dump(TREE))
    overrides = ["train.steps=50", "train.lr=1.0e-3", "model.moe.heads=4", "cluster.workers={min: 1, max: 2}"]
    values = {
        "train.steps": 50,
        "train.lr": 1e-3,
        "model.moe.heads": 4,
        "cluster.workers": {"min": 1, "max": 2},
    }
    original_tree = deepcopy(TREE)
    specs = [
        mh.load_spec(source, keys) for source in ("own.yaml", Path("own.yaml"), TREE) for keys in (overrides, values)
    ]
    assert all(spec == specs[0] for spec in specs)
    assert original_tree == TREE
    assert (specs[0].train.steps, specs[0].model.moe.heads, specs[0].origin) == (50, 4, "mhmoe tiny")
    assert specs[0].storage == tmp_path / "runs"
    assert specs[0].data.sources["web"].path == str(tmp_path / "raw")


def test_paths_may_be_path_objects(tmp_path):
    data = {"sources": {"web": {"path": tmp_path / "raw"}}, "prepared": tmp_path / "prepared"}
    spec = mh.load_spec({**TREE, "data": data}, {"storage": tmp_path / "elsewhere"})
    assert spec.data.sources["web"].path == str(tmp_path / "raw")
    assert spec.storage == tmp_path / "elsewhere"


def test_a_run_starts_from_a_run_or_a_checkpoint(tmp_path):
    run = mh.Run(make_run(tmp_path, MODELS["dense"]))
    [checkpoint] = run.checkpoints()
    tree = {key: TREE[key] for key in ("name", "data")} | {
        "train": {"steps": 5, "micro_batches": 1, "micro_batch_size": 1, "lr": 1e-3}
    }
    expected = mh.load_spec({**tree, "start": {"from": f"{run.path}@7"}})
    assert list(expected.start.sources) == [str(checkpoint.path)]
    for source in (run, checkpoint):
        assert mh.load_spec({**tree, "start": {"from": source}}) == expected
        assert mh.load_spec(tree, {"start.from": source}) == expected


def test_numbers_of_numpy_are_numbers():
    overrides = {"train.steps": np.int64(50), "train.lr": np.float64(1e-3), "train.betas": np.array([0.5, 0.75])}
    train = {"warmup_steps": np.int64(3)}
    spec = mh.load_spec({**TREE, "train": train}, overrides)
    assert (spec.train.steps, spec.train.lr, spec.train.betas, spec.train.warmup_steps) == (50, 1e-3, (0.5, 0.75), 3)


@pytest.mark.parametrize(
    "value", [1e-5, True, None, "no", "x: y", "two\nlines", [1, "2"], {"a": {"b": 1.5}}, "é" * 200]
)
def test_values_of_overrides_come_through_yaml_unchanged(value):
    assert parse_overrides(override_list({"a.b": value})) == [(["a", "b"], value)]


def test_mistakes_name_the_spec_and_the_key(tmp_path):
    with pytest.raises(SpecError, match=r"^spec own: unknown key 'train.stepz'; did you mean 'steps'"):
        mh.load_spec(TREE, {"train.stepz": 1})
    with pytest.raises(SpecError, match=r"^spec: 'name' is missing"):
        mh.load_spec({key: value for key, value in TREE.items() if key != "name"})
    with pytest.raises(SpecError, match=r"^spec .*nothing.yaml: No such file"):
        mh.load_spec(tmp_path / "nothing.yaml")
    with pytest.raises(SpecError, match=r"^override 'train.steps': it is not key=value"):
        mh.load_spec(TREE, "train.steps")
    for source in (None, [1]):
        with pytest.raises(SpecError, match=r"^spec: it is of type \w+; give the path of a YAML file, or a mapping"):
            mh.load_spec(source)
    with pytest.raises(SpecError, match=r"^spec: it is loaded already"):
        mh.load_spec(mh.load_spec(TREE))
    for function in (mh.submit, mh.plan):
        with pytest.raises(SpecError, match=r"^spec: it is of type dict; give what mhmoe_ray\.load_spec returns"):
            function(TREE)


def test_a_cluster_on_paper_is_complete():
    spec = mh.load_spec({**TREE, "train": {"micro_batches": 8}})
    plan = mh.plan(spec, nodes=2, gpus=2)
    assert plan["layout"]["workers"] == plan["layout"]["gpus"] == 4
    assert plan["estimate"]["step"]["seconds_in_turn"] > 0
    for arguments in ({"nodes": 2}, {"gpus": 2}, {"nodes": 0, "gpus": 1}, {"nodes": 1, "gpus": 1, "address": "lab"}):
        with pytest.raises(SpecError, match="a cluster on paper has"):
            mh.plan(spec, **arguments)
    with pytest.raises(
        SpecError, match=r"train\.micro_batches: 8 make 64 samples in a step, which 3 GPUs cannot share"
    ):
        mh.plan(spec, nodes=1, gpus=3)
