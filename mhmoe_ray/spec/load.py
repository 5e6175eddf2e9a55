"""Read a spec from YAML with `a.b=c` overrides; a mistake is one line that names the key and the nearest right one."""

import difflib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from mhmoe_ray.errors import SpecError
from mhmoe_ray.spec.run import RunSpec
from mhmoe_ray.spec.serve import DeploySpec


def load_spec(path: Path, overrides: Sequence[str] = ()) -> RunSpec:
    """Read and check a spec.

    Args:
        path: a YAML file.
        overrides: `key.path=value` strings; values are YAML, so `1e-3`, `null` and `[a, b]` mean what they say.

    Raises:
        SpecError: the file is missing or not YAML, or a key or value is wrong.
    """
    tree = _read(path)
    for keys, value in parse_overrides(overrides):
        _set(tree, keys, value)
    try:
        return RunSpec.model_validate(tree)
    except ValidationError as e:
        raise _explain(f"spec {path}", e) from e


def load_deploy_spec(path: Path | None, overrides: Sequence[str] = ()) -> DeploySpec:
    """What serving uses of a spec; defaults and overrides alone without one.

    Raises:
        SpecError: as `load_spec`.
    """
    tree = _read(path) if path else {}
    tree = {name: tree[name] for name in DeploySpec.model_fields if name in tree}
    for keys, value in parse_overrides(overrides):
        _set(tree, keys, value)
    try:
        return DeploySpec.model_validate(tree)
    except ValidationError as e:
        raise _explain(f"spec {path}" if path else "the overrides", e) from e


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        reason = getattr(e, "strerror", None) or "it is not UTF-8 text"
        raise SpecError(f"spec {path}", str(reason), "give the path of a YAML spec such as jobs/quickstart.yaml") from e
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise SpecError(f"spec {path}", f"{where}{getattr(e, 'problem', None) or e}", "correct the YAML") from e
    if not isinstance(tree, dict):
        raise SpecError(f"spec {path}", "it holds no mapping", "start from jobs/quickstart.yaml")
    return tree


def dump_spec(spec: RunSpec) -> str:
    """The spec as YAML that `load_spec` reads back to an equal spec."""
    return yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def parse_overrides(overrides: Sequence[str]) -> list[tuple[list[str], Any]]:
    """`["train.steps=5"]` to `[(["train", "steps"], 5)]`."""
    parsed = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not all(key.split(".")):
            raise SpecError(f"override {override!r}", "it is not key=value", "write for example train.steps=50")
        try:
            parsed.append((key.split("."), yaml.safe_load(value)))
        except yaml.YAMLError as e:
            raise SpecError(f"override {override!r}", "the value is not YAML", "quote it as YAML needs") from e
    return parsed


def _set(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    node = tree
    for i, key in enumerate(keys[:-1]):
        child = node.setdefault(key, {})
        if child is None:
            child = node[key] = {}
        if not isinstance(child, dict):
            why = f"{'.'.join(keys[: i + 1])} is a value, not a section"
            raise SpecError(f"override {'.'.join(keys)}", why, "name a key of a section")
        node = child
    node[keys[-1]] = value


def _explain(what: str, error: ValidationError) -> SpecError:
    """The first mistake as one line; wrong keys before wrong values, since they often cause them."""
    problems = sorted(error.errors(), key=lambda p: p["type"] != "extra_forbidden")
    first = problems[0]
    where = ".".join(str(part) for part in first["loc"]) or "the spec"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _known_keys(first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.4)
        fix = f"did you mean {near[0]!r}?" if near else f"known keys here: {', '.join(known)}"
        return SpecError(what, f"unknown key {where!r}", fix + more)
    if first["type"] == "missing":
        return SpecError(what, f"{where!r} is missing", f"add it{more}")
    why = first["msg"].removeprefix("Value error, ")
    given = first.get("input")
    shown = f" (got {given!r})" if isinstance(given, str | int | float | bool | None) else ""
    return SpecError(what, f"{where!r}: {why}{shown}", f"correct the value{more}")


def _known_keys(section: tuple[int | str, ...]) -> list[str]:
    """Keys that the section at this place of the spec has."""
    current: Any = RunSpec
    for part in section:
        if isinstance(current, type) and issubclass(current, BaseModel):
            current = _inner(current.model_fields[str(part)].annotation)
        else:
            current = _inner(typing.get_args(current)[-1])
    return list(current.model_fields) if isinstance(current, type) and issubclass(current, BaseModel) else []


def _inner(annotation: Any) -> Any:
    """`X | None` to `X`."""
    if isinstance(annotation, types.UnionType):
        return next(a for a in typing.get_args(annotation) if a is not type(None))
    return annotation
