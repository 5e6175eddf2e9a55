"""The first difference of two values."""

from typing import Any

SHOWN = 200
"""Largest number of characters of a value that is shown."""


def first_difference(base: Any, here: Any, path: str = "") -> str | None:
    """Return where two JSON values first differ and how, in one line, or None where they are equal.

    Args:
        base: The value of the commit.
        here: The value of the working tree.
        path: The keys and indices that lead to the values.
    """
    if isinstance(base, dict) and isinstance(here, dict):
        keys = list(dict.fromkeys([*base, *here]))
        return _first_of(base, here, keys, path)
    if isinstance(base, list) and isinstance(here, list):
        by_place = [dict(enumerate(values)) for values in (base, here)]
        return _first_of(*by_place, list(range(max(len(base), len(here)))), path)
    if isinstance(base, str) and isinstance(here, str) and "\n" in base + here:
        return first_difference(base.split("\n"), here.split("\n"), f"{path} line")
    # 1 == 1.0 == True in Python, and they are three different things in JSON; NaN is never equal to itself.
    if repr(base) == repr(here):
        return None
    return f"{path.strip() or 'it'} is {_shown(base)}, and here {_shown(here)}"


def _first_of(base: dict[Any, Any], here: dict[Any, Any], keys: list[Any], path: str) -> str | None:
    for key in keys:
        below = f"{path} {key}"
        if key not in here:
            return f"{below.strip()} is {_shown(base[key])}, and here it is not there"
        if key not in base:
            return f"{below.strip()} is not there, and here {_shown(here[key])}"
        if (difference := first_difference(base[key], here[key], below)) is not None:
            return difference
    return None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
