"""Tests that tables of files in the docstrings of packages are complete."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = sorted(p.parent for top in ("mhmoe_ray", "kernels/mhmoe_kernels") for p in (ROOT / top).rglob("__init__.py"))


def module_names(package: Path) -> list[str]:
    """Return the names of a package's modules and subpackages, as tables write them: `name.py` and `name/`."""
    modules = [file.name for file in package.glob("*.py") if file.name != "__init__.py"]
    return sorted([*modules, *(f"{file.parent.name}/" for file in package.glob("*/__init__.py"))])


@pytest.mark.parametrize("package", PACKAGES, ids=[str(p.relative_to(ROOT)) for p in PACKAGES])
def test_tables_name_every_file_of_their_package(package):
    """A docstring has a table if one of its lines begins with the name of a module or subpackage."""
    text = ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or ""
    listed_names = set(re.findall(r"(?<![\w/.])\w+(?:\.py\b|/)", text))
    if any(line.startswith(tuple(module_names(package))) for line in map(str.strip, text.splitlines())):
        assert [part for part in module_names(package) if part not in listed_names] == []
