"""Tests that links in Markdown documents lead to existing files and headings, and that CLAIMS.md names real tests."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
DOCUMENTS = [name for name in TRACKED if name.endswith(".md")]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_to_files_and_headings_that_exist(name):
    document = ROOT / name
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", document.read_text()):
        path, _, heading = target.partition("#")
        linked = document.parent / path if path else document
        assert linked.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", linked.read_text(), re.M)
            assert heading in {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}, target


def test_claims_name_tests_that_exist():
    claimed_paths = set(re.findall(r"\btests/[\w/]+(?:\.py)?", (ROOT / "tests/CLAIMS.md").read_text()))
    assert len(claimed_paths) > 20
    assert [name for name in claimed_paths if not (ROOT / name).exists()] == []
