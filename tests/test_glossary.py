"""Tests that a search for a term of the glossary in CONTRIBUTING.md finds the file that explains the term first."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
TERMS = re.findall(r"^\| ([\w -]+?) \| .+ \| `([\w/]+\.py)` \|$", TEXT[TEXT.index("## Glossary") :], re.M)
SOURCES = {
    path.relative_to(package.parent if package.name == "mhmoe_kernels" else package).as_posix(): path.read_text()
    for package in (ROOT / "mhmoe_ray", ROOT / "kernels" / "mhmoe_kernels")
    for path in package.rglob("*.py")
}


def test_the_glossary_has_terms():
    assert len(TERMS) > 20


@pytest.mark.parametrize(("term", "file"), TERMS)
def test_search_finds_the_file_of_a_term_first(term, file):
    """The first file is the one with the most matching lines, as `git grep -c -i` counts them.

    A space matches `-` too, and the other way round.
    """
    pattern = re.compile(re.sub(r"[ -]", "[ -]", term), re.IGNORECASE)
    counts = {path: sum(map(bool, map(pattern.search, source.split("\n")))) for path, source in SOURCES.items()}
    most_in_others = max(count for path, count in counts.items() if path != file)
    assert counts[file] > most_in_others, sorted(counts.items(), key=lambda item: -item[1])[:3]
