"""Tests that the guides to the code name files, folders and functions that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "mhmoe_ray/README.md").read_text()
TEXT = (ROOT / "CONTRIBUTING.md").read_text() + GUIDE
TOUR = GUIDE[GUIDE.index("## Three walks") : GUIDE.index("## Rules of some parts")]
NAMED_FUNCTIONS = sorted(set(re.findall(r"`([\w/]+\.py)`,?\s+`([A-Za-z_][\w.]*)`", TOUR)))
PATHS = sorted(set(re.findall(r"`([\w/]+(?:\.py|/))`", TEXT)))
FOLDERS = (ROOT, ROOT / "mhmoe_ray", ROOT / "kernels/mhmoe_kernels")


def definitions(tree: ast.Module) -> set[str]:
    """Return the names that a module defines at its top level, and `Class.name` for the methods of its classes."""
    names = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{part.name}" for part in node.body if hasattr(part, "name")}
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def test_walks_name_many_functions():
    assert len(NAMED_FUNCTIONS) > 40


@pytest.mark.parametrize(("path", "name"), NAMED_FUNCTIONS)
def test_functions_of_the_walks_are_in_the_named_files(path, name):
    assert name in definitions(ast.parse((ROOT / "mhmoe_ray" / path).read_text()))


@pytest.mark.parametrize("path", [path for path in PATHS if "/" in path.rstrip("/")])
def test_paths_exist(path):
    assert any((folder / path).exists() for folder in FOLDERS)
