"""Compare the definitions of this tree with those of a commit, whichever files they are in:
`python -m tests.definitions COMMIT`.

A pure change of structure only moves definitions between files and rewrites imports. This script lists every other
edit: the top-level statements of the packages that only one of the two trees has, after

- import statements, module docstrings and `__all__` are left out,
- `module.name`, where `module` is one of ours, is replaced by `name`,
- all names of our modules and all paths of our files in strings are replaced by one fixed text.

`--rename OLD=NEW` replaces a name of the commit first, which shows that a renaming changes nothing else.
The exit code is 1 if there is an edit.
"""

import argparse
import ast
import re
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
FOLDERS = ("mhmoe_ray", "kernels/mhmoe_kernels", "jobs")
OUR_PACKAGES = ("mhmoe_ray", "mhmoe_kernels")
LOCATION_PATTERN = re.compile(r"\bmhmoe_(ray|kernels)(\.\w+)*|(\w+/)*\w+\.py\b|\b(\w+/)+")
"""Pattern of dotted names of our modules, and of paths of Python files and of folders, in strings."""


class Definition(NamedTuple):
    """A top-level statement of a tree."""

    shape: str
    """Dump of the syntax tree, without the parts that depend on the statement's file; equal for equal definitions."""
    location: str
    """File, line and defined names, for the printed list."""


def definitions(root: Path, names: Mapping[str, str]) -> Iterator[Definition]:
    """Yield the top-level statements of all packages below `root`, except imports, module docstrings and `__all__`.

    Args:
        root: The root folder of a tree.
        names: Names to replace, with their replacements.
    """
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            tree = ast.parse(path.read_text())
            modules, originals = imported_names(tree, root)
            for number, node in enumerate(tree.body):
                if is_left_out(node, is_first=number == 0):
                    continue
                # A parameter or variable hides an imported module of the same name, so that name is no module in this
                # statement.
                local = bound_names(node)
                normalizer = StatementNormalizer(modules - local, originals, names)
                shape = ast.dump(normalizer.visit(node))
                yield Definition(shape, f"{path.relative_to(root)}:{node.lineno} {', '.join(defined_names(node))}")


def imported_names(tree: ast.Module, root: Path) -> tuple[set[str], dict[str, str]]:
    """Return how a file names what it imports from our packages.

    Returns:
        The names of imported modules, and for each other definition that is imported under an alias its original name
        by that alias.
    """
    modules, originals = set(), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(OUR_PACKAGES):
            folder = Path(*(node.module or "").split("."))
            for alias in node.names:
                candidates = [root / top / folder / alias.name for top in ("", "kernels")]
                if any(candidate.is_dir() or candidate.with_suffix(".py").exists() for candidate in candidates):
                    modules.add(alias.asname or alias.name)
                elif alias.asname:
                    originals[alias.asname] = alias.name
    return modules, originals


def is_left_out(node: ast.stmt, is_first: bool) -> bool:
    """Return whether a top-level statement is an import, the module's docstring, or `__all__`."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return all(isinstance(statement, ast.Import | ast.ImportFrom) for statement in node.body)
    if is_first and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True
    return isinstance(node, ast.Import | ast.ImportFrom) or defined_names(node) == ["__all__"]


def defined_names(node: ast.stmt) -> list[str]:
    """Return the names that a top-level statement defines; if it defines none, its kind, such as `If`."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)] or [type(node).__name__]


def bound_names(node: ast.stmt) -> set[str]:
    """Return the names of all parameters and variables that are bound inside a statement."""
    parameters = {child.arg for child in ast.walk(node) if isinstance(child, ast.arg)}
    stored = {child.id for child in ast.walk(node) if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store)}
    return parameters | stored


class StatementNormalizer(ast.NodeTransformer):
    """Transformer that removes from a statement everything that depends on the file that it is in.

    It drops imports of our packages, replaces `module.name` by `name`, aliases by the original names, and locations in
    strings by one text. It also applies the replacements of names.

    Args:
        modules: The names by which the file refers to our modules.
        originals: The original names by alias.
        names: Names to replace, with their replacements.
    """

    def __init__(self, modules: set[str], originals: Mapping[str, str], names: Mapping[str, str]) -> None:
        self.modules, self.originals, self.names = modules, originals, names

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        if isinstance(node.value, ast.Name) and node.value.id in self.modules:
            return ast.Name(self.names.get(node.attr, node.attr), node.ctx)
        self.generic_visit(node)
        node.attr = self.names.get(node.attr, node.attr)
        return node

    def visit_Name(self, node: ast.Name) -> ast.Name:
        name = self.originals.get(node.id, node.id)
        return ast.Name(self.names.get(name, name), node.ctx)

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        if not isinstance(node.value, str):
            return node
        text = self.names.get(node.value, LOCATION_PATTERN.sub("<place>", node.value))
        return ast.Constant(" ".join(text.split()))

    def generic_visit(self, node: ast.AST) -> ast.AST:
        """Replace names of definitions and parameters, drop imports of our packages, and visit the child nodes."""
        if isinstance(name := getattr(node, "name", None), str):
            node.name = self.names.get(name, name)  # type: ignore[attr-defined] # functions, classes, aliases, handlers
        if isinstance(node, ast.arg):
            node.arg = self.names.get(node.arg, node.arg)
        for field in ("body", "orelse", "finalbody"):
            if isinstance(statements := getattr(node, field, None), list):
                kept_statements = [statement for statement in statements if not is_our_import(statement)]
                setattr(node, field, kept_statements or ([ast.Pass()] if statements else []))
        return super().generic_visit(node)


def is_our_import(node: ast.stmt) -> bool:
    """Return whether a statement imports from one of our packages."""
    return isinstance(node, ast.ImportFrom) and (node.module or "").startswith(OUR_PACKAGES)


def main() -> int:
    """Print the statements that only one tree has; return 1 if there are any, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit")
    parser.add_argument("--rename", action="append", default=[], metavar="OLD=NEW")
    arguments = parser.parse_args()
    names = dict(rename.split("=", 1) for rename in arguments.rename)
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "commit.tar"
        command = [
            "git",
            "archive",
            "-o",
            str(archive),
            arguments.commit,
            *(folder_name.split("/")[0] for folder_name in FOLDERS),
        ]
        subprocess.run(command, cwd=ROOT, check=True)
        with tarfile.open(archive) as files:
            files.extractall(folder, filter="data")
        base_definitions, our_definitions = list(definitions(Path(folder), names)), list(definitions(ROOT, {}))
    counts = [Counter(definition.shape for definition in side) for side in (base_definitions, our_definitions)]
    edits = 0
    for title, side, other_counts in (
        ("only in the commit", base_definitions, counts[1]),
        ("only in this tree", our_definitions, counts[0]),
    ):
        unmatched_counts = other_counts.copy()
        for definition in side:
            if unmatched_counts[definition.shape] > 0:
                unmatched_counts[definition.shape] -= 1
            else:
                print(f"{title}: {definition.location}")
                edits += 1
    statement_counts = f"{len(base_definitions):,} statements in {arguments.commit}, {len(our_definitions):,} here"
    print(f"{statement_counts}; {edits} without a twin")
    return min(edits, 1)


if __name__ == "__main__":
    sys.exit(main())
