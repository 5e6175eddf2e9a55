"""Tests of jobs/paper/results.py, which computes the tables of RESULTS.md from stored losses."""

import importlib.util
import json
from pathlib import Path

import pytest
from scipy import stats

PAPER = Path(__file__).parents[2] / "jobs/paper"


@pytest.fixture
def results_script():
    spec = importlib.util.spec_from_file_location("results", PAPER / "results.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_results_has_the_verdicts_that_follow_from_the_stored_losses(results_script):
    text = results_script.RESULTS.read_text()
    assert len(results_script.TABLE_PATTERN.findall(text)) == text.count("<!-- verdicts") > 0
    assert results_script.render(text) == text


def test_every_interval_beside_smoe_is_that_of_a_paired_t_test(results_script):
    rows = json.loads((PAPER / "losses/gates.json").read_text())
    variants = [name for name in rows if name != "smoe"]
    lines = results_script.verdict_table(rows, "smoe", variants).splitlines()[3:]
    smoe = list(rows["smoe"]["losses"].values())
    for name, line in zip(variants, lines, strict=True):
        interval = stats.ttest_rel(list(rows[name]["losses"].values()), smoe).confidence_interval(0.95)
        assert line.startswith(f"| {name} ")
        assert f"{interval.low:+.4f} to {interval.high:+.4f}" in line


def test_added_runs_complete_the_seeds_of_a_variant(results_script, tmp_path):
    path = tmp_path / "sweep.json"
    row = {"variant": "a", "states": {"finished": 1}, "step": 9, "parameters": 5, "macs_per_token": 4}
    results_script.add(path, [{**row, "losses": {"0": 1.5}}])
    results_script.add(path, [{**row, "losses": {"1": 2.5}}, {**row, "variant": "b", "states": {"queued": 1}}])
    assert json.loads(path.read_text()) == {
        "a": {"step": 9, "parameters": 5, "macs_per_token": 4, "losses": {"0": 1.5, "1": 2.5}}
    }
