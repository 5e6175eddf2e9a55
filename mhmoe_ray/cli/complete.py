"""What a shell offers where a run or a key of a spec is wanted; `mhmoe --install-completion` tells the shell to ask."""

import os
from collections.abc import Iterator
from typing import Any

STORAGE = "runs"


def runs(incomplete: str) -> list[str]:
    """Ids of runs in the storage that commands look into."""
    from mhmoe_ray.errors import MhmoeError
    from mhmoe_ray.runs.directory import list_runs

    try:
        found = [run.id for run in list_runs(os.environ.get("MHMOE_STORAGE", STORAGE))]
    except MhmoeError:
        return []  # a shell that completes has no place for errors
    return [name for name in reversed(found) if name.startswith(incomplete)]


def keys(incomplete: str) -> list[str]:
    """Keys of a spec, as --set takes them, shorthands first."""
    from mhmoe_ray.planner.resolve import Shorthands
    from mhmoe_ray.spec import RunSpec

    return [key for section in (Shorthands, RunSpec) for key in _keys(section) if key.startswith(incomplete)]


def _keys(model: Any, before: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        inner = _model_in(field.annotation)
        if inner is not None and set(inner.model_fields) != {"min", "max"}:  # a range is written as a number too
            yield from _keys(inner, f"{before}{name}.")
        else:
            yield f"{before}{name}="


def _model_in(annotation: Any) -> Any:
    """A section itself, or one that may be absent; not those in a list or a table, which have no fixed keys."""
    from types import NoneType, UnionType
    from typing import Union, get_args, get_origin

    from pydantic import BaseModel

    if get_origin(annotation) in (Union, UnionType):
        rest = [a for a in get_args(annotation) if a is not NoneType]
        annotation = rest[0] if len(rest) == 1 else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
