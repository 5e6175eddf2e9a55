"""The sweep file: runs that differ in some keys of the spec, each with several seeds."""

import re
from pathlib import Path
from typing import Any, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from mhmoe_ray.spec.base import Section, SweepName
from mhmoe_ray.spec.run import RunSpec

Overrides = dict[str, Any]
"""Values by dotted key of a spec (`train.steps`), including shorthands such as `preset`."""
RESERVED_KEYS = {"name": "it is composed of names in this file", "seed": "use seeds"}
"""Keys that a sweep file must not set, with the end of the error message."""


class SweepSize(Section):
    """Settings that all runs of a sweep share at one size."""

    spec: Path
    """Path of the spec that all runs are based on. A relative path starts at the folder of the sweep file."""
    set: Overrides = Field(default_factory=dict)
    """Keys of the spec that this size overrides, with their values."""
    runs: dict[str, Overrides] = Field(default_factory=dict)
    """Keys of the spec that this size overrides for one run only, with their values, by the name of the run."""
    only: list[str] | None = Field(default=None, min_length=1)
    """Names of the runs that exist at this size; by default all runs."""


class SweepSpec(Section):
    """Runs that differ in some keys of a spec, at several sizes and with several seeds."""

    name: SweepName
    """Name of the sweep, in lower-case letters, digits and dashes. The names of its runs begin with it."""
    sizes: dict[str, SweepSize] = Field(min_length=1)
    """Sizes of the sweep by name, each with a spec. The first size is the default."""
    runs: dict[str, Overrides] = Field(default_factory=dict)
    """Keys of the spec that each run overrides, with their values, by the name of the run."""
    grid: dict[str, list[Any]] = Field(default_factory=dict)
    """Values to try, by key of the spec. Each of `runs`, or the spec itself if there are no `runs`, is run with every
    combination of the values."""
    seeds: list[NonNegativeInt] = Field(default=[0], min_length=1)
    concurrent: PositiveInt = 1
    """Largest number of runs that train at the same time."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.runs and not self.grid:
            raise ValueError("there is nothing to vary: give runs or grid")
        if empty_keys := [key for key, values in self.grid.items() if not values]:
            raise ValueError(f"grid has no value for {empty_keys[0]}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("a seed is given twice")
        self._check_keys()
        for name, size in self.sizes.items():
            unknown_runs = [run for run in (*size.runs, *(size.only or ())) if run not in self.runs]
            if unknown_runs:
                raise ValueError(f"size {name} names the run {unknown_runs[0]!r}, which is not among runs")
        return self

    def _check_keys(self) -> None:
        size_overrides = [keys for size in self.sizes.values() for keys in size.runs.values()]
        varied_keys = {key for keys in (self.grid, *self.runs.values(), *size_overrides) for key in keys}
        for key in sorted(varied_keys.union(*(size.set for size in self.sizes.values())) & RESERVED_KEYS.keys()):
            raise ValueError(f"{key} of each run is set by the sweep: {RESERVED_KEYS[key]}")
        # A sweep has one directory, in the same storage as its runs, so its runs cannot have different storages.
        if "storage" in varied_keys:
            raise ValueError(
                "storage must be the same for all runs of a sweep: set it by a size's `set`, or by an override"
            )


def seeded_name(name: str, seed: int) -> str:
    """Return a run's name with a suffix for its seed, such as `h4-s0`."""
    return f"{name}-s{seed}"


def unseeded_name(name: str) -> str:
    """Return a name from `seeded_name` without its suffix, and any other name unchanged."""
    return re.sub(r"-s\d+$", "", name)


class SweepRun(Section):
    """Run of a sweep: a variant (a set of values for keys) with one seed, and its complete spec."""

    variant: str
    """Name without the suffix for the seed, such as h4."""
    seed: NonNegativeInt
    spec: RunSpec

    @property
    def name(self) -> str:
        return seeded_name(self.variant, self.seed)
