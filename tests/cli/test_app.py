"""Behaviour that all commands share, and combinations of options."""

import json
from pathlib import Path

import pytest

import mhmoe_ray
from mhmoe_ray.cli.common import print_json
from tests.cli.run import mhmoe


def test_it_tells_its_version(tmp_path):
    assert mhmoe(tmp_path, "--version").out == f"mhmoe {mhmoe_ray.__version__}\n"


def test_an_error_has_a_traceback_only_where_it_is_asked_for(tmp_path):
    plain, debugged = mhmoe(tmp_path, "plan", "no.yaml"), mhmoe(tmp_path, "--debug", "plan", "no.yaml")
    assert plain.err.startswith("error: spec no.yaml")
    assert debugged.err.startswith("Traceback")
    assert debugged.err.splitlines()[-1].endswith(plain.err.removeprefix("error: ").strip())


@pytest.mark.parametrize("words", [("--json",), ("--json", "--continue")])
def test_a_run_that_is_followed_is_not_told_as_json(corpus, words):
    refused = mhmoe(corpus, "submit", "spec.yaml", *words)
    assert refused.code == 2
    assert "give --detach too" in refused.err


def test_json_has_null_for_what_is_not_finite(capsys):
    inf, nan = float("inf"), float("nan")
    print_json({"a": nan, "b": [inf, 1.5, (-inf,)], "c": {"d": nan, 3: "x"}, "e": Path("f")})
    told = capsys.readouterr().out
    assert json.loads(told, parse_constant=pytest.fail) == {
        "a": None, "b": [None, 1.5, [None]], "c": {"d": None, "3": "x"}, "e": "f"
    }  # fmt: skip
