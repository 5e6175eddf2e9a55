"""Parsers of JSON and YAML that others may have written: whatever is wrong with a text is a `ParseError`.

The parsers of Python and PyYAML also raise errors of other kinds: a RecursionError for deep nesting, a bare ValueError
for a date such as 2026-13-45, an AttributeError for some wrong tags. Anchors of YAML can make a tree that contains
itself, or one that is exponentially larger than its text.
"""

import json
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import yaml
from pydantic import ConfigDict, Field, TypeAdapter
from typing_extensions import TypedDict

MAX_DEPTH = 50
"""Deepest nesting of a YAML file."""
MAX_NODES = 200_000
"""Largest number of values in a YAML file, counted as often as anchors repeat them."""


Parser = Callable[[bytes], dict[str, Any]]
"""Function that returns the JSON object in a text; any other text is a ValueError."""
Count = Annotated[int, Field(ge=0, lt=2**63)]
Figure = Annotated[float, Field(gt=-1e100, lt=1e100)]
"""Number whose sums and products are finite."""
Time = Annotated[float, Field(ge=0, lt=1e11)]
"""Seconds since the epoch, up to the year 5138."""


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


def object_parser(fields: Mapping[str, Any]) -> Parser:
    """Return a parser of objects with fields of these types, of which those in `Required` must be there.

    It is built when it is first used, and is faster than `json.loads`.
    """
    config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, defer_build=True)
    make_type: Any = TypedDict
    object_type = make_type("object_type", dict(fields), total=False)
    object_type.__pydantic_config__ = config
    return TypeAdapter[dict[str, Any]](object_type).validate_json


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
