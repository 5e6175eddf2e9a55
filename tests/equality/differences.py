"""The first difference of two values."""

from typing import Any

SHOWN_CHARACTERS = 200
"""Largest number of characters of a value that is shown."""


def first_difference(base: Any, actual: Any, path: str = "") -> str | None:
    """Describe in one line where and how two JSON values first differ; return None if they are equal.

    Args:
        base: The value of the commit.
        actual: The value of the working tree.
        path: The keys and indices that lead to the values.
    """
    if isinstance(base, dict) and isinstance(actual, dict):
        keys = list(dict.fromkeys([*base, *actual]))
        return _first_difference_of_keys(base, actual, keys, path)
    if isinstance(base, list) and isinstance(actual, list):
        values_by_index = [dict(enumerate(values)) for values in (base, actual)]
        return _first_difference_of_keys(*values_by_index, list(range(max(len(base), len(actual)))), path)
    if isinstance(base, str) and isinstance(actual, str) and "\n" in base + actual:
        return first_difference(base.split("\n"), actual.split("\n"), f"{path} line")
    # `repr` is compared, because 1, 1.0 and True are equal in Python but not in JSON, and because NaN counts as equal
    # here.
    if repr(base) == repr(actual):
        return None
    return f"{path.strip() or 'it'} is {_shortened(base)}, and here {_shortened(actual)}"


def _first_difference_of_keys(base: dict[Any, Any], actual: dict[Any, Any], keys: list[Any], path: str) -> str | None:
    """Describe the first difference between the values of two mappings, in the order of `keys`; None if equal."""
    for key in keys:
        inner_path = f"{path} {key}"
        if key not in actual:
            return f"{inner_path.strip()} is {_shortened(base[key])}, and here it is not there"
        if key not in base:
            return f"{inner_path.strip()} is not there, and here {_shortened(actual[key])}"
        if (difference := first_difference(base[key], actual[key], inner_path)) is not None:
            return difference
    return None


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."
