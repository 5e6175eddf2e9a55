"""Functions that read a spec from YAML, apply `a.b=c` overrides, and check the result.

An error is a SpecError with a message of one line, which names the wrong key and the most similar known one.
"""

import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from mhmoe_ray.errors import SpecError
from mhmoe_ray.parsing import ParseError, parse_yaml
from mhmoe_ray.spec.base import section_keys
from mhmoe_ray.spec.hints import key_hint
from mhmoe_ray.spec.run import RunSpec
from mhmoe_ray.spec.serve import DeploySpec
from mhmoe_ray.spec.site import SiteSpec
from mhmoe_ray.spec.sweep import SweepSpec
from mhmoe_ray.storage import Location, read_file

S = TypeVar("S", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """YAML loader that refuses duplicate keys; yaml's own loader silently takes the last value."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Duplicate keys are looked for here, before yaml inserts merges (`<<`), because a merge may legitimately repeat
        # a key.
        node = super().compose_mapping_node(anchor)
        seen_keys = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen_keys:
                    problem = f"the key {key.value!r} is given twice"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                seen_keys.add((key.tag, key.value))
        return node


def load_resolved_spec(path: Location, overrides: Sequence[str] = ()) -> RunSpec:
    """Read a complete spec, such as that of a run directory; `planner.resolve` reads those with shorthands."""
    return validate_section(RunSpec, read_tree(path, overrides), f"spec {path}")


def read_tree(path: Location, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read the mapping in a YAML file and apply overrides; keys and values are not checked."""
    try:
        text = read_file(path).decode()
    except (OSError, UnicodeDecodeError) as e:
        reason = getattr(e, "strerror", None) or "it is not UTF-8 text"
        raise SpecError(f"spec {path}", str(reason), "give the path of a YAML spec, or write one: mhmoe init") from e
    try:
        tree = parse_yaml(text, _Loader)
    except ParseError as e:
        raise SpecError(f"spec {path}", str(e), "correct the YAML") from e
    if not isinstance(tree, dict):
        raise SpecError(f"spec {path}", "it is not a mapping", "write one: mhmoe init")
    return apply_overrides(tree, overrides)


def load_site(path: Location) -> SiteSpec:
    """Read and check a site file, which describes a cluster."""
    return validate_section(SiteSpec, read_tree(path), f"site {path}")


def load_sweep(path: Location, overrides: Sequence[str] = ()) -> SweepSpec:
    """Read and check a sweep file."""
    tree = read_tree(path, overrides)
    if "model" in tree and "runs" not in tree:
        raise SpecError(f"sweep {path}", "it is the spec of one run, not a sweep", "give it to `mhmoe submit`")
    return validate_section(SweepSpec, tree, f"sweep {path}")


def load_deploy_spec(
    path: Location | None,
    overrides: Sequence[str] = (),
    find_ignored_keys: Callable[[DeploySpec], Collection[str]] = lambda _: (),
) -> DeploySpec:
    """Read and check the sections of a spec that serving uses; without a file, defaults and overrides apply.

    `find_ignored_keys` returns the keys of the file, such as "serve.host", that are ignored too.
    """
    file_tree, label = read_tree(path) if path else {}, f"spec {path}" if path else "the overrides"
    tree = {name: file_tree[name] for name in DeploySpec.model_fields if name in file_tree}
    for key in find_ignored_keys(validate_section(DeploySpec, tree, label)):
        section, _, name = key.partition(".")
        del tree[section][name]
    return validate_section(DeploySpec, apply_overrides(tree, overrides), label)


def validate_section(
    section: type[S], tree: dict[str, Any], label: str, prefix: str = "", extra_keys: Sequence[str] = ()
) -> S:
    """Build a section of a spec from the values in a file, and check the values.

    `label` names the spec in an error, `prefix` is the section's dotted prefix such as "model.", and `extra_keys` are
    further keys that the hint on a misspelt key may suggest.
    """
    try:
        return section.model_validate(tree)
    except ValidationError as e:
        raise _spec_error(section, e, label, prefix, extra_keys) from e


def dotted_items(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys of a dumped spec, such as `train.steps`, and their values other than None."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from dotted_items(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", value


def dump_spec(spec: RunSpec) -> str:
    """Return the spec as YAML, from which `load_resolved_spec` restores an equal spec."""
    return yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def parse_overrides(overrides: Sequence[str]) -> list[tuple[list[str], Any]]:
    """Parse overrides: `["train.steps=5"]` becomes `[(["train", "steps"], 5)]`."""
    parsed = []
    for override in overrides:
        key, equals, value = (part.strip() for part in override.partition("="))
        if not equals or not all(key.split(".")):
            raise SpecError(f"override {override!r}", "it is not key=value", "write for example train.steps=50")
        try:
            parsed.append((key.split("."), parse_yaml(value)))
        except ParseError as e:
            raise SpecError(f"override {override!r}", "the value is not YAML", "quote it as YAML needs") from e
    return parsed


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply `key.path=value` strings with YAML values to the dictionaries of a spec in place, and return them."""
    for keys, value in parse_overrides(overrides):
        _set_value(tree, keys, value)
    return tree


def _set_value(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    node = tree
    key, remaining_keys = _split_key(node, keys)
    while remaining_keys:
        child = node.setdefault(key, {})
        # A section whose keys are all commented out is None in YAML.
        if child is None:
            child = node[key] = {}
        if not isinstance(child, dict):
            reason = f"{'.'.join(keys[: len(keys) - len(remaining_keys)])} is a value, not a section"
            raise SpecError(f"override {'.'.join(keys)}", reason, "name a key of a section")
        node = child
        key, remaining_keys = _split_key(node, remaining_keys)
    node[key] = value


def _split_key(section: dict[str, Any], keys: list[str]) -> tuple[str, list[str]]:
    # The name of a source may be that of a file, which has a dot.
    dotted_keys = (".".join(keys[:count]) for count in range(len(keys), 1, -1))
    key = next((key for key in dotted_keys if key in section), keys[0])
    return key, keys[key.count(".") + 1 :]


def _spec_error(
    section: type[BaseModel], error: ValidationError, label: str, prefix: str, extra_keys: Sequence[str]
) -> SpecError:
    # Wrong keys come first, because they often cause wrong or missing values. A default that needs a wrong value is no
    # mistake of its own.
    mistakes = (p for p in error.errors() if p["type"] != "default_factory_not_called")
    problems = sorted(mistakes, key=lambda p: p["type"] != "extra_forbidden")
    problem = problems[0]
    key_path = (prefix + ".".join(str(part) for part in problem["loc"])).removesuffix(".") or "the spec"
    count_note = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if problem["type"] == "extra_forbidden":
        known_keys = _section_keys(section, problem["loc"][:-1]) + (
            list(extra_keys) if len(problem["loc"]) == 1 else []
        )
        *section_path, key = map(str, problem["loc"])
        fix = key_hint(key, prefix + "".join(f"{part}." for part in section_path), known_keys)
        return SpecError(label, f"unknown key {key_path!r}", fix + count_note)
    if problem["type"] == "missing":
        return SpecError(label, f"{key_path!r} is missing", f"add it{count_note}")
    reason = problem["msg"].removeprefix("Value error, ")
    value = problem.get("input")
    value_note = f" (got {value!r})" if isinstance(value, str | int | float | bool | None) else ""
    return SpecError(label, f"{key_path!r}: {reason}{value_note}", f"correct the value{count_note}")


def _section_keys(root: type[BaseModel], section_path: tuple[int | str, ...]) -> list[str]:
    current: Any = root
    for part in section_path:
        if isinstance(current, type) and issubclass(current, BaseModel):
            fields = dict(zip(section_keys(current), current.model_fields.values(), strict=True))
            current = _non_none_type(fields[str(part)].annotation)
        else:
            # The last type argument of dict[str, X], list[X] or tuple[X, ...] is the type X of the values.
            current = _non_none_type([a for a in typing.get_args(current) if a is not Ellipsis][-1])
    return section_keys(current) if isinstance(current, type) and issubclass(current, BaseModel) else []


def _non_none_type(annotation: Any) -> Any:
    if isinstance(annotation, types.UnionType):
        return next(a for a in typing.get_args(annotation) if a is not type(None))
    return annotation
