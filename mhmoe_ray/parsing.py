"""Parsers of JSON and YAML that others may have written: whatever is wrong with a text is a `ParseError`.

The parsers of Python and PyYAML also raise errors of other kinds: a RecursionError for deep nesting, a bare ValueError
for a date such as 2026-13-45, an AttributeError for some wrong tags. Anchors of YAML can make a tree that contains
itself, or one that is exponentially larger than its text.
"""

import json
from typing import Any

import yaml

MAX_DEPTH = 50
"""Deepest nesting of a YAML file."""
MAX_NODES = 200_000
"""Largest number of values in a YAML file, counted as often as anchors repeat them."""


class ParseError(ValueError):
    """An error about a text that cannot be parsed; its message is a clause without a line break."""


def parse_json(content: str | bytes) -> Any:
    """Return the value of a JSON text in UTF-8."""
    try:
        return json.loads(content)
    except RecursionError as e:
        raise ParseError("it is nested too deeply") from e
    except ValueError as e:
        raise ParseError(_one_line(e)) from e


def parse_object(content: str | bytes) -> dict[str, Any]:
    """Return the object of a JSON text in UTF-8; any other value is a ParseError."""
    value = parse_json(content)
    if not isinstance(value, dict):
        raise ParseError("it is no JSON object")
    return value


def parse_yaml(text: str, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """Return the value of a YAML text."""
    try:
        value = yaml.load(text, loader)
    except yaml.MarkedYAMLError as e:
        position = f"line {e.problem_mark.line + 1}: " if e.problem_mark else ""
        raise ParseError(f"{position}{e.problem or e}") from e
    except RecursionError as e:
        raise ParseError("it is nested too deeply") from e
    # PyYAML's constructors of dates, numbers, tags and merges raise errors of these kinds for values that they misread.
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, OverflowError) as e:
        raise ParseError(f"a value is not of its type: {_one_line(e)}") from e
    _check_size(value)
    return value


def _check_size(value: Any) -> None:
    """Raise a ParseError about a tree that is too deep or too large, or contains itself."""
    nodes, level = 0, [value]
    for _ in range(MAX_DEPTH):
        children = list[Any]()
        for node in level:
            if isinstance(node, dict):
                children += node.values()
            elif isinstance(node, list | set | tuple):
                children += node
            if nodes + len(children) > MAX_NODES:
                raise ParseError(f"it has more than {MAX_NODES:,} values")
        nodes, level = nodes + len(children), children
        if not level:
            return
    raise ParseError(f"it is nested more than {MAX_DEPTH} levels deep, or contains itself")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
