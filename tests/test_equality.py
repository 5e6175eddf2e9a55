"""Tests of the rules by which `make equal` compares the results of two versions of the project."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.equality import reading
from tests.equality.differences import first_difference
from tests.equality.normal import Normaliser
from tests.equality.side import Side


@pytest.mark.parametrize(
    ("base", "actual", "difference"),
    [
        ({"a": [1, {"b": 2.0}]}, {"a": [1, {"b": 2.0}]}, None),
        ({"a": [1, {"b": 2.0}]}, {"a": [1, {"b": 2.5}]}, "a 1 b is 2.0, and here 2.5"),
        ({"a": 1}, {"a": 1.0}, "a is 1, and here 1.0"),
        ({"a": 0}, {"a": False}, "a is 0, and here False"),
        ({"a": 1, "b": 2}, {"a": 1}, "b is 2, and here it is not there"),
        ({"a": 1}, {"a": 1, "b": 2}, "b is not there, and here 2"),
        ([1, 2], [1], "1 is 2, and here it is not there"),
        (float("nan"), float("nan"), None),
        ("one\ntwo", "one\n2", "line 1 is 'two', and here '2'"),
    ],
)
def test_first_difference_is_described(base, actual, difference):
    assert first_difference(base, actual) == difference


def test_normaliser_leaves_out_only_what_differs_between_calls():
    answer = {
        "run": "tiny-0a1b2c",
        "time": 1.5,
        "eta_seconds": None,
        "path": "/somewhere/side/runs",
        "url": "http://127.0.0.1:23456/v1",
        "files": {"b": {"size": 1}, "a": {"size": 2}},
        "loss": 1.25,
    }
    assert Normaliser(Path("/somewhere/side")).value(answer) == {
        "run": "tiny-<id>",
        "time": "(left out)",
        "eta_seconds": None,
        "path": "<side>/runs",
        "url": "http://127.0.0.1:<port>/v1",
        "files": ["a", "b"],
        "loss": 1.25,
    }


def test_a_changed_bit_of_a_tensor_is_found(tmp_path):
    values = np.ones((2, 3), np.float32)
    save_file({"x": values, "y": values}, tmp_path / "base.safetensors")
    values = values.copy()
    values[1, 2] = np.nextafter(np.float32(1), np.float32(2))
    save_file({"x": values, "y": np.ones((2, 3), np.float32)}, tmp_path / "here.safetensors")
    base, actual = (reading.tensors(tmp_path / f"{name}.safetensors") for name in ("base", "here"))
    assert base["y"] == actual["y"]
    assert base["x"]["sha256"] != actual["x"]["sha256"]
    assert str(first_difference(base, actual)).startswith("x norm is ")


def test_a_process_that_imported_other_code_is_reported(tmp_path):
    tree = tmp_path / "tree"
    (tree / "own").mkdir(parents=True)
    (tree / "own" / "__init__.py").touch()
    (tree / "own" / "main.py").write_text("def main():\n    print('done')\n")
    (tree / "pyproject.toml").write_text('[project.scripts]\nmhmoe = "own.main:main"\n')
    side = Side(tmp_path, "avx2")
    assert side.text() == "done\n"
    assert side.check_imports("bin/mhmoe") == []
    assert side.check_imports("nonsense") == ["no process of 'nonsense' imported the project"]
    with side.imports.open("a") as record:
        record.write(json.dumps({"package": "own", "origin": "/elsewhere/own.py", "command": ["x"]}) + "\n")
    assert side.check_imports() == ["['x'] imported own from /elsewhere/own.py"]
