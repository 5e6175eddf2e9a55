"""Read a spec from YAML with `a.b=c` overrides. An error is reported in one line, which names the key and the nearest
valid one."""

import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from mhmoe_ray.errors import SpecError
from mhmoe_ray.spec.hints import hint
from mhmoe_ray.spec.run import RunSpec
from mhmoe_ray.spec.serve import DeploySpec
from mhmoe_ray.spec.site import SiteSpec
from mhmoe_ray.spec.sweep import SweepSpec
from mhmoe_ray.storage import Location

S = TypeVar("S", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """YAML loader that refuses a duplicate key, of which yaml would silently take the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Before merges (`<<`) are put in, which may bring the same keys.
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    problem = f"the key {key.value!r} is there already"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                seen.add((key.tag, key.value))
        return node


def load_resolved_spec(path: Location, overrides: Sequence[str] = ()) -> RunSpec:
    """Read and check a complete spec, such as that of a run directory.

    Specs written by users may contain shorthands as well, which `planner.resolve` resolves.

    Raises:
        SpecError: the file is missing or is not YAML, or a key or value is wrong.
    """
    return checked(RunSpec, read_tree(path, overrides), f"spec {path}")


def read_tree(path: Location, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the mapping of a YAML file after overrides, unchecked.

    Args:
        path: path of a YAML file.
        overrides: `key.path=value` strings; values are YAML, so `1e-3`, `null` and `[a, b]` have their YAML meaning.

    Raises:
        SpecError: the file is missing, not YAML, or not a mapping; a key is given twice; or an override is malformed.
    """
    try:
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as e:
        reason = getattr(e, "strerror", None) or "it is not UTF-8 text"
        raise SpecError(f"spec {path}", str(reason), "give the path of a YAML spec such as jobs/quickstart.yaml") from e
    try:
        tree = yaml.load(text, _Loader)
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise SpecError(f"spec {path}", f"{where}{getattr(e, 'problem', None) or e}", "correct the YAML") from e
    if not isinstance(tree, dict):
        raise SpecError(f"spec {path}", "it holds no mapping", "start from jobs/quickstart.yaml")
    return overridden(tree, overrides)


def load_site(path: Location) -> SiteSpec:
    """Read and check a site file, which describes a cluster.

    Raises:
        SpecError: as in `load_resolved_spec`.
    """
    return checked(SiteSpec, read_tree(path), f"site {path}")


def load_sweep(path: Location, overrides: Sequence[str] = ()) -> SweepSpec:
    """Read and check a sweep's file, which describes its runs.

    Raises:
        SpecError: as in `load_resolved_spec`.
    """
    return checked(SweepSpec, read_tree(path, overrides), f"sweep {path}")


def load_deploy_spec(path: Location | None, overrides: Sequence[str] = ()) -> DeploySpec:
    """Read and check the sections of a spec that serving uses; without a file, only defaults and overrides apply.

    Raises:
        SpecError: as in `load_resolved_spec`.
    """
    whole = read_tree(path) if path else {}
    tree = {name: whole[name] for name in DeploySpec.model_fields if name in whole}
    overridden(tree, overrides)
    return checked(DeploySpec, tree, f"spec {path}" if path else "the overrides")


def checked(section: type[S], tree: dict[str, Any], what: str, below: str = "", also: Sequence[str] = ()) -> S:
    """Build a section from its values and check them.

    Args:
        section: class of the section.
        tree: its values.
        what: name of the spec in an error message.
        below: dotted prefix of the section within the spec, such as "model.".
        also: additional keys that may stand beside the section's own, for the hint on a misspelt key.

    Raises:
        SpecError: a key or value is wrong or missing; one line says which.
    """
    try:
        return section.model_validate(tree)
    except ValidationError as e:
        raise _explain(section, e, what, below, also) from e


def leaves(tree: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys of a dumped spec, as `--set` takes them, with their values; keys without a value are left
    out."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{before}{key}.")
        elif value is not None:
            yield f"{before}{key}", value


def dump_spec(spec: RunSpec) -> str:
    """Return the spec as YAML, which `load_resolved_spec` reads back to an equal spec."""
    return yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def parse_overrides(overrides: Sequence[str]) -> list[tuple[list[str], Any]]:
    """Parse overrides: `["train.steps=5"]` becomes `[(["train", "steps"], 5)]`.

    Raises:
        SpecError: an override is not `key=value`, or its value is not YAML.
    """
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


def overridden(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply `key.path=value` strings to a tree in place, and return it.

    Raises:
        SpecError: an override is malformed, or its path goes through a value.
    """
    for keys, value in parse_overrides(overrides):
        _set(tree, keys, value)
    return tree


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


def _explain(section: type[BaseModel], error: ValidationError, what: str, below: str, also: Sequence[str]) -> SpecError:
    """Return the first mistake as one line. Wrong keys come before wrong values, because they often cause them."""
    problems = sorted(error.errors(), key=lambda p: p["type"] != "extra_forbidden")
    first = problems[0]
    where = (below + ".".join(str(part) for part in first["loc"])).removesuffix(".") or "the spec"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _known_keys(section, first["loc"][:-1]) + (list(also) if len(first["loc"]) == 1 else [])
        *place, key = map(str, first["loc"])
        fix = hint(key, below + "".join(f"{part}." for part in place), known)
        return SpecError(what, f"unknown key {where!r}", fix + more)
    if first["type"] == "missing":
        return SpecError(what, f"{where!r} is missing", f"add it{more}")
    why = first["msg"].removeprefix("Value error, ")
    given = first.get("input")
    shown = f" (got {given!r})" if isinstance(given, str | int | float | bool | None) else ""
    return SpecError(what, f"{where!r}: {why}{shown}", f"correct the value{more}")


def _known_keys(root: type[BaseModel], place: tuple[int | str, ...]) -> list[str]:
    """Return the keys that the section at `place` below `root` has."""
    current: Any = root
    for part in place:
        if isinstance(current, type) and issubclass(current, BaseModel):
            current = _inner(current.model_fields[str(part)].annotation)
        else:
            current = _inner([a for a in typing.get_args(current) if a is not Ellipsis][-1])
    return list(current.model_fields) if isinstance(current, type) and issubclass(current, BaseModel) else []


def _inner(annotation: Any) -> Any:
    """Return `X` for an annotation `X | None`; any other annotation is returned unchanged."""
    if isinstance(annotation, types.UnionType):
        return next(a for a in typing.get_args(annotation) if a is not type(None))
    return annotation
