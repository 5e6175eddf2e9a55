"""Test that the errors of the Python interface do not name options of the command line.

Errors that are raised below `mhmoe_ray.cli` also reach users of the Python interface, who pass arguments instead of
options. A whole command in backticks is allowed, because these users can run it, too. The benchmarks and the rendering
of files are not checked, because only commands call them.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import mhmoe_ray

PACKAGE = Path(mhmoe_ray.__file__).parent
OPTION = re.compile(r"(?<![\w-])--[a-z]")
TEXT_NAMES = {"reason", "fix", "advice"}
OTHER_TOOLS = ("--shm-size", "--dashboard-host")
"""Options of container engines and of Ray, which errors may name."""


def string_texts(node: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of each string in an expression; an f-string has X for each value."""
    if isinstance(node, ast.JoinedStr):
        yield node.lineno, "".join(part.value if isinstance(part, ast.Constant) else "X" for part in node.values)
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, str):
            yield node.lineno, node.value
    else:
        for child in ast.iter_child_nodes(node):
            yield from string_texts(child)


def error_texts(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of each string that a module passes to an error or assigns to one of `TEXT_NAMES`."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id=name)) if name.endswith("Error"):
                for argument in node.args:
                    yield from string_texts(argument)
            case ast.Assign(targets=targets):
                names = {child.id for target in targets for child in ast.walk(target) if isinstance(child, ast.Name)}
                if names & TEXT_NAMES:
                    yield from string_texts(node.value)


def bare_option(text: str) -> str | None:
    """Return a text if it names an option outside of a command in backticks; None otherwise."""
    outside = re.sub(r"`[^`]*`", "", text)
    return text if OPTION.search(outside) and not any(option in outside for option in OTHER_TOOLS) else None


def test_errors_below_the_command_line_name_no_options():
    texts = []
    for path in PACKAGE.rglob("*.py"):
        folder = path.relative_to(PACKAGE).parts[0]
        if folder not in ("cli", "bench", "render"):
            texts += [(path.name, line, text) for line, text in error_texts(ast.parse(path.read_text()))]
    assert len(texts) > 500
    assert [(name, line, text) for name, line, text in texts if bare_option(text)] == []
    assert bare_option("give --until a number")
    assert not bare_option("train it longer: `mhmoe resume X --until STEPS`")
