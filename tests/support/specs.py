"""Small specs for tests."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mhmoe_ray.checkpoint.start.resolve import build_spec
from mhmoe_ray.spec import RunSpec, read_tree

TINY: dict[str, Any] = {
    "name": "tiny",
    "storage": "runs",
    "model": {
        "vocab_size": 300,
        "d_model": 32,
        "layers": 2,
        "attention_heads": 2,
        "d_ff": 48,
        "moe": {"heads": 2, "experts": 4, "top_k": 2, "d_expert": 24},
    },
    "data": {"sources": {"web": {"path": "raw"}}, "prepared": "prepared", "seq_len": 16},
    "train": {"steps": 20, "micro_batches": 4, "micro_batch_size": 2, "lr": 3e-3, "warmup_steps": 2},
}


def tiny_spec(folder: Path = Path("/nowhere"), **changes: Any) -> RunSpec:
    """Return the spec `TINY` with changes, and with its relative paths below `folder`.

    A change of a section replaces the keys that it has; any other change replaces the value or adds the key.
    """
    tree = TINY | {
        key: {**TINY.get(key, {}), **value} if isinstance(value, dict) else value for key, value in changes.items()
    }
    return RunSpec.model_validate(tree).with_absolute_paths(folder)


def load_relative_spec(path: Path, overrides: Sequence[str] = ()) -> RunSpec:
    """Return the spec of a file like `mhmoe_ray.load_spec`, but keep relative paths."""
    return build_spec(read_tree(path, overrides), f"spec {path}")


def with_changes(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of the tree of a spec with changed values, whose keys have `__` for the dots of a path."""
    changed_tree = copy.deepcopy(dict(tree))
    for path, value in changes.items():
        *sections, key = path.split("__")
        section = changed_tree
        for name in sections:
            section = section.setdefault(name, {})
        section[key] = copy.deepcopy(value)
    return changed_tree
