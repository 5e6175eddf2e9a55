"""The tables of files in the docstrings of packages are complete."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = sorted(p.parent for top in ("mhmoe_ray", "kernels/mhmoe_kernels") for p in (ROOT / top).rglob("__init__.py"))


def parts(package: Path) -> list[str]:
    """Return the names of a package's modules and subpackages, as tables write them."""
    modules = [file.name for file in package.glob("*.py") if file.name != "__init__.py"]
    return sorted([*modules, *(f"{file.parent.name}/" for file in package.glob("*/__init__.py"))])


@pytest.mark.parametrize("package", PACKAGES, ids=[str(p.relative_to(ROOT)) for p in PACKAGES])
def test_a_docstring_with_a_table_names_every_file(package):
    """A docstring has a table where one of its lines begins with the name of a file."""
    text = ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or ""
    listed_names = set(re.findall(r"(?<![\w/.])\w+(?:\.py\b|/)", text))
    if any(line.startswith(tuple(parts(package))) for line in map(str.strip, text.splitlines())):
        assert [part for part in parts(package) if part not in listed_names] == []
