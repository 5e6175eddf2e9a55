"""Tests of jobs/paper/results.py, which computes the verdicts of RESULTS.md and its pages from stored losses."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from scipy import stats

PAPER = Path(__file__).parents[2] / "jobs/paper"
INTERVAL = r"[+-]\d\.\d{4}\s+to\s+[+-]\d\.\d{4}"
# An interval, and its verdict where that follows, after a comma or in the next cell of a table.
STATED = re.compile(rf"({INTERVAL})(?:(?:,\s+|\)? \| )((?:better|worse|equal|undecided)(?:,\s+\d+\s+seeds)?))?", re.S)


@pytest.fixture(scope="module")
def results_script():
    spec = importlib.util.spec_from_file_location("results", PAPER / "results.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@pytest.fixture(scope="module")
def verdicts(results_script):
    """Return the verdicts of all tables as (interval, words of the verdict)."""
    tables = [table for page in results_script.PAGES for table in results_script.tables_of(page.read_text())]
    cells = [
        map(results_script.verdict_cells, results_script.verdicts_by_variant(*table[1:]).values()) for table in tables
    ]
    return {(interval, words) for row in cells for _, interval, _, words in row}


def test_pages_have_the_verdicts_that_follow_from_the_stored_losses(results_script):
    for page in results_script.PAGES:
        text = page.read_text()
        assert len(results_script.TABLE_PATTERN.findall(text)) == text.count("<!-- verdicts")
        assert results_script.render(text) == text, page.name


def test_every_interval_in_the_text_of_a_page_is_one_of_a_table_and_has_its_verdict(results_script, verdicts):
    stated = [(page.name, *match) for page in results_script.PAGES for match in STATED.findall(page.read_text())]
    assert len(stated) > len(verdicts) > 0
    for page_name, *cells in stated:
        interval, words = (" ".join(cell.split()) for cell in cells)
        computed_words = {row_words for row_interval, row_words in verdicts if row_interval == interval}
        assert computed_words, f"{page_name}: {interval} is in no table"
        assert not words or words in computed_words, f"{page_name}: {interval}, {words}"


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
