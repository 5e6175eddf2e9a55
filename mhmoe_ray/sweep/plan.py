"""The runs of a sweep, as complete specs."""

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mhmoe_ray.errors import SpecError
from mhmoe_ray.planner.resolve import resolve_spec
from mhmoe_ray.spec import RunSpec, SweepRun, SweepSize, SweepSpec
from mhmoe_ray.spec.run import NAME_LENGTH
from mhmoe_ray.spec.sweep import RESERVED_KEYS, seeded_name


def planned_runs(sweep: SweepSpec, folder: Path, size: str, overrides: Sequence[str] = ()) -> list[SweepRun]:
    """Return the runs of all variants and seeds of a sweep, with their complete specs.

    All variants of a seed come before those of the next seed, so that a sweep that ends early has runs of each variant.

    Args:
        sweep: the sweep, as in its file.
        folder: the folder of that file.
        size: the name of one of its sizes.
        overrides: `key.path=value` strings for every run.

    Raises:
        SpecError: there is no such size, two variants have the same name, or a run's spec is wrong.
    """
    if size not in sweep.sizes:
        raise SpecError(f"sweep {sweep.name}", f"it has no size {size!r}", f"choose from {', '.join(sweep.sizes)}")
    for key in (override.partition("=")[0].strip() for override in overrides):
        if key in RESERVED_KEYS:
            raise SpecError(f"override {key}", f"{key} of each run is set by the sweep", RESERVED_KEYS[key])
    common = sweep.sizes[size]
    variants: dict[str, dict[str, Any]] = {}
    for name, keys in _variants(sweep, common):
        if name in variants:
            raise SpecError(f"sweep {sweep.name}", f"two of its runs are called {name}", "give each a different name")
        variants[name] = keys
    return [
        SweepRun(variant=name, seed=seed, spec=_spec(sweep, folder / common.spec, name, seed, keys, overrides))
        for seed in sweep.seeds
        for name, keys in variants.items()
    ]


def _variants(sweep: SweepSpec, size: SweepSize) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name of each variant, and the keys that make it from the common spec; the grid's keys come last."""
    keys_by_name = {name: keys for name, keys in sweep.runs.items() if size.only is None or name in size.only} or {
        "": {}
    }
    for name, keys in keys_by_name.items():
        for values in itertools.product(*sweep.grid.values()):
            grid_keys = dict(zip(sweep.grid, values, strict=True))
            grid_words = [f"{key.rpartition('.')[2]}-{value}" for key, value in grid_keys.items()]
            full_name = _slug("-".join(filter(None, [name, *grid_words])))
            variant_name = _shortened_name(full_name, sweep) if grid_words else full_name
            yield variant_name, {**size.set, **keys, **size.runs.get(name, {}), **grid_keys}


def _shortened_name(name: str, sweep: SweepSpec) -> str:
    """Return the name of a variant, cut to the length that names of runs allow; a cut name ends with a digest."""
    # The suffix is measured as if the largest seed had at least four digits. Otherwise a larger seed that is added
    # later could leave less room for the name and so rename the variant.
    room = NAME_LENGTH - len(seeded_name(f"{sweep.name}-", max(1000, *sweep.seeds)))
    if len(name) <= room:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:6]
    return f"{name[: max(0, room - len(digest) - 1)].rstrip('-')}-{digest}".lstrip("-")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _spec(
    sweep: SweepSpec, path: Path, name: str, seed: int, keys: Mapping[str, Any], overrides: Sequence[str]
) -> RunSpec:
    """Return the spec of a run: the spec file at `path` with the variant's keys, the user's overrides, and the seed.

    Raises:
        SpecError: the spec is wrong; the error names the run.
    """
    run_name = seeded_name(f"{sweep.name}-{name}", seed)
    name_and_seed = [f"name={run_name}", f"seed={seed}"]
    key_overrides = [f"{key}={json.dumps(value, default=str)}" for key, value in keys.items()]
    try:
        return resolve_spec(path, [*key_overrides, *overrides, *name_and_seed])
    except SpecError as e:
        raise SpecError(f"sweep {sweep.name}, run {name}: {e.subject}", e.reason, e.fix) from e
