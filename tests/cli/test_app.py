"""Tests of behaviour that all commands share."""

import json
from pathlib import Path

import pytest

import mhmoe_ray
from mhmoe_ray.cli.output import print_json
from tests.cli.run import mhmoe


def test_version_option_prints_the_version(tmp_path):
    assert mhmoe(tmp_path, "--version").out == f"mhmoe {mhmoe_ray.__version__}\n"


def test_error_has_a_traceback_only_with_debug(tmp_path):
    plain, debugged = mhmoe(tmp_path, "plan", "no.yaml"), mhmoe(tmp_path, "--debug", "plan", "no.yaml")
    assert plain.err.startswith("error: spec no.yaml")
    assert debugged.err.startswith("Traceback")
    assert debugged.err.splitlines()[-1].endswith(plain.err.removeprefix("error: ").strip())


@pytest.mark.parametrize("words", [("--json",), ("--json", "--continue")])
def test_json_of_a_followed_run_is_refused(corpus, words):
    result = mhmoe(corpus, "submit", "spec.yaml", *words)
    assert result.code == 2
    assert "give --detach too" in result.err


def test_json_has_null_for_numbers_that_are_not_finite(capsys):
    inf, nan = float("inf"), float("nan")
    print_json({"a": nan, "b": [inf, 1.5, (-inf,)], "c": {"d": nan, 3: "x"}, "e": Path("f")})
    output = capsys.readouterr().out
    assert json.loads(output, parse_constant=pytest.fail) == {
        "a": None, "b": [None, 1.5, [None]], "c": {"d": None, "3": "x"}, "e": "f"
    }  # fmt: skip
