"""Loading of a spec from a file or from a mapping."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mhmoe_ray.errors import SpecError
from mhmoe_ray.planner.resolve import resolve_spec
from mhmoe_ray.spec import RunSpec, apply_overrides, read_tree

Overrides = Sequence[str] | Mapping[str, Any]
"""Overrides of keys of a spec: `["train.steps=50"]`, with values in YAML, or `{"train.steps": 50}`."""


def load_spec(source: str | os.PathLike[str] | Mapping[str, Any], overrides: Overrides = ()) -> RunSpec:
    """Return the complete spec of a YAML file or of a mapping with the same keys.

    Presets, sizes that match a reference model, and the defaults of a `start` section are filled in. Relative paths
    become absolute, starting at the current directory.

    Args:
        source: path of a YAML file such as jobs/quickstart.yaml, or a mapping. The `start.from` of a mapping may be a
            `Run` or a `Checkpoint`.
        overrides: keys that replace those of the source, such as `["train.steps=50"]` or `{"train.steps": 50}`.

    Raises:
        SpecError: the file cannot be read, or a key, a value or an override is wrong.
        RunError, CheckpointError, DataError: a model that the run starts from cannot be read.
    """
    override_texts = override_list(overrides)
    if not isinstance(source, Mapping | str | os.PathLike):
        reason, fix = f"it is of type {type(source).__name__}", "give the path of a YAML file, or a mapping"
        if isinstance(source, RunSpec):
            reason, fix = "it is loaded already", "give overrides with the file or mapping that it was loaded from"
        raise SpecError("spec", reason, fix)
    if isinstance(source, Mapping):
        tree = apply_overrides(_plain_tree(source), override_texts)
        label = f"spec {tree.get('name', '')}".strip()
    else:
        tree, label = read_tree(Path(source), override_texts), f"spec {source}"
    if tree.get("start") is None:
        spec = resolve_spec(tree, label)
    else:
        # This import is delayed, because only the models that a run starts from need what it imports.
        from mhmoe_ray.checkpoint.start.resolve import build_spec

        spec = build_spec(tree, label)
    return spec.with_absolute_paths(Path.cwd())


def require_spec(spec: object) -> None:
    """Raise a SpecError if an argument is not a loaded spec but, for example, the mapping of one."""
    if not isinstance(spec, RunSpec):
        raise SpecError("spec", f"it is of type {type(spec).__name__}", "give what mhmoe_ray.load_spec returns")


def override_list(overrides: Overrides) -> list[str]:
    """Return overrides as a list of `key.path=value` strings, whose values are YAML."""
    if isinstance(overrides, Mapping):
        return [f"{key}={_yaml_value(value)}" for key, value in overrides.items()]
    # A single string is a sequence too, and `list` would split it into its characters.
    return [overrides] if isinstance(overrides, str) else list(overrides)


def _yaml_value(value: Any) -> str:
    text = yaml.safe_dump(_plain_value(value), default_flow_style=True, allow_unicode=True, width=float("inf"))
    # YAML ends a document that is a bare scalar with a line of dots.
    return text.removesuffix("...\n").rstrip("\n")


def _plain_tree(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a spec's mapping as a YAML file would give it: paths become text, and tuples become lists."""
    return {key: _plain_value(value) for key, value in tree.items()}


def _plain_value(value: Any) -> Any:
    # A checkpoint, which stands for its path, is also a tuple, so this test comes before that for tuples.
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return _plain_tree(value)
    if isinstance(value, list | tuple):
        return [_plain_value(item) for item in value]
    # Numbers and arrays of numpy, and tensors of torch, have the method `tolist`, which returns plain Python values.
    return value.tolist() if hasattr(value, "tolist") else value
