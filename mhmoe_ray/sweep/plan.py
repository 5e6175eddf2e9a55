"""The plan of a sweep: its training runs, each with its complete spec."""

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mhmoe_ray.checkpoint.start.resolve import build_spec
from mhmoe_ray.checkpoint.start.source import SWEEP_PREFIX, find_start_model, sweep_variant
from mhmoe_ray.errors import SpecError
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.spec import RunSpec, SweepRun, SweepSize, SweepSpec, read_tree
from mhmoe_ray.spec.base import NAME_LENGTH
from mhmoe_ray.spec.sweep import RESERVED_KEYS, seeded_name


def planned_runs(sweep: SweepSpec, folder: Path, size: str, overrides: Sequence[str] = ()) -> list[SweepRun]:
    """Return the runs of all variants and seeds of a sweep, with their complete specs.

    All variants of a seed come before those of the next seed, so that a sweep that ends early has runs of each variant.
    `folder` is that of the sweep file, and `overrides` are `key.path=value` strings for every run. An unknown size, two
    variants with the same name and a wrong spec are SpecErrors.
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
    _refuse_undone_nulls(sweep, variants, overrides)
    runs = []
    for seed in sweep.seeds:
        planner = _SeedPlanner(sweep, folder / common.spec, variants, seed, overrides)
        runs += [SweepRun(variant=name, seed=seed, spec=planner.spec(name)) for name in variants]
    return runs


def _refuse_undone_nulls(sweep: SweepSpec, variants: Mapping[str, Mapping[str, Any]], overrides: Sequence[str]) -> None:
    """Raise a SpecError if an override sets a key in a section that a variant leaves out by `null`."""
    for override_key in (override.partition("=")[0].strip() for override in overrides):
        for name, keys in variants.items():
            for key, value in keys.items():
                if value is None and override_key.startswith(f"{key}."):
                    reason = f"its run {name} has {key}: null, which this override would undo"
                    fix = "set the key in the file, for each run"
                    raise SpecError(f"sweep {sweep.name}, override {override_key}", reason, fix)


class _SeedPlanner:
    """Resolver of the specs of all runs with one seed; a run comes after the runs from whose checkpoints it starts."""

    def __init__(
        self,
        sweep: SweepSpec,
        path: Path,
        variants: Mapping[str, Mapping[str, Any]],
        seed: int,
        overrides: Sequence[str],
    ) -> None:
        self._sweep, self._path, self._variants = sweep, path, variants
        self._seed, self._overrides = seed, overrides
        self._specs: dict[str, RunSpec | None] = {}
        """Specs by variant; None while a spec is being resolved, which reveals runs that start from each other."""

    def spec(self, variant: str) -> RunSpec:
        """Return the complete spec of a variant's run; runs that start from each other in a circle are a SpecError."""
        subject = f"sweep {self._sweep.name}, start.from sweep:{variant}"
        if variant not in self._variants:
            raise SpecError(subject, "it has no such run", f"choose from {', '.join(self._variants)}")
        if variant not in self._specs:
            self._specs[variant] = None
            self._specs[variant] = self._resolve(variant)
        resolved_spec = self._specs[variant]
        if resolved_spec is None:
            raise SpecError(subject, "it starts, directly or not, from the run itself", "remove one of these starts")
        return resolved_spec

    def _resolve(self, variant: str) -> RunSpec:
        """Return a run's spec from the file, the variant's keys, overrides and the seed; errors name the run."""
        run_name = seeded_name(f"{self._sweep.name}-{variant}", self._seed)
        name_and_seed = [f"name={run_name}", f"seed={self._seed}"]
        key_overrides = [f"{key}={json.dumps(value, default=str)}" for key, value in self._variants[variant].items()]
        try:
            tree = read_tree(self._path, [*key_overrides, *self._overrides, *name_and_seed])
            return build_spec(tree, f"spec {self._path}", self.spec)
        except SpecError as e:
            raise SpecError(f"sweep {self._sweep.name}, run {variant}: {e.subject}", e.reason, e.fix) from e


def _variants(sweep: SweepSpec, size: SweepSize) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each variant's name and the values that it sets by key of the spec; those of the grid take precedence."""
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
    """Cut a variant's name to the length that run names allow, with a digest of the whole name at its end."""
    # The suffix for the seed is measured as if the largest seed had at least four digits. Otherwise a larger seed that
    # is added later could leave less room for the name of a variant and so rename the variant.
    room = NAME_LENGTH - len(seeded_name(f"{sweep.name}-", max(1000, *sweep.seeds)))
    if len(name) <= room:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:6]
    return f"{name[: max(0, room - len(digest) - 1)].rstrip('-')}-{digest}".lstrip("-")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def start_names(entry: SweepRun) -> list[str]:
    """Return the names of the runs of the same sweep from whose checkpoints a run starts."""
    sources = entry.spec.start.sources if entry.spec.start else []
    return [seeded_name(sweep_variant(source), entry.seed) for source in sources if source.startswith(SWEEP_PREFIX)]


def with_run_paths(entry: SweepRun, runs: Mapping[str, RunDir]) -> RunSpec:
    """Return a run's spec with checkpoint paths in place of names of the sweep's runs, or raise a CheckpointError."""
    start = entry.spec.start
    if start is None:
        return entry.spec
    sources = []
    for source in start.sources:
        if source.startswith(SWEEP_PREFIX):
            run = runs[seeded_name(sweep_variant(source), entry.seed)]
            _, at_sign, step = source.partition("@")
            source = find_start_model(f"{run.path}{at_sign}{step}", entry.spec.storage).source
        sources.append(source)
    return entry.spec.model_copy(update={"start": start.with_sources(sources)})


def with_sweep_names(started_spec: RunSpec, entry: SweepRun) -> RunSpec:
    """Return a started run's spec with the sweep's run names in place of paths, to compare it with the planned one."""
    start, entry_start = started_spec.start, entry.spec.start
    if start is None or entry_start is None or len(start.sources) != len(entry_start.sources):
        return started_spec
    sources = [
        entry_source if entry_source.startswith(SWEEP_PREFIX) else source
        for source, entry_source in zip(start.sources, entry_start.sources, strict=True)
    ]
    return started_spec.model_copy(update={"start": start.with_sources(sources)})
