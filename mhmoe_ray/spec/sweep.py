"""A sweep: runs that differ in some keys of the spec, each with several seeds."""

import re
from pathlib import Path
from typing import Any, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from mhmoe_ray.spec.base import Section
from mhmoe_ray.spec.run import RunSpec

Overrides = dict[str, Any]
"""Values by dotted key of a spec (`train.steps`), including shorthands such as `preset`."""
OWN_KEYS = {"name": "it is made of names here", "seed": "use seeds"}
"""Keys of a spec that a sweep sets itself for each of its runs, with what to do instead of setting them."""


class SweepSize(Section):
    """Settings that all runs of a sweep share at one size."""

    spec: Path
    """Path of the spec of the runs; a relative path is taken from the folder of the sweep's file."""
    set: Overrides = Field(default_factory=dict)
    """Keys that this size overrides in the spec."""
    runs: dict[str, Overrides] = Field(default_factory=dict)
    """Keys that this size overrides in single runs, by the name of the run."""
    only: list[str] | None = Field(default=None, min_length=1)
    """Names of the runs that exist at this size; by default all."""


class SweepSpec(Section):
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,20}$")
    """Name of the sweep, in lower-case letters, digits and dashes; the names of its runs begin with it."""
    sizes: dict[str, SweepSize] = Field(min_length=1)
    """Sizes by name; the first is the default."""
    runs: dict[str, Overrides] = Field(default_factory=dict)
    """Keys that each run overrides, by the name of the run."""
    grid: dict[str, list[Any]] = Field(default_factory=dict)
    """Values by key; each of `runs`, or the spec itself if there are none, is run with every combination of them."""
    seeds: list[NonNegativeInt] = Field(default=[0], min_length=1)
    concurrent: PositiveInt = 1
    """Number of runs at the same time."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.runs and not self.grid:
            raise ValueError("there is nothing to vary: give runs or grid")
        if empty := [key for key, values in self.grid.items() if not values]:
            raise ValueError(f"grid has no value for {empty[0]}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("a seed is there twice")
        self._check_keys()
        for name, size in self.sizes.items():
            unknown = [run for run in (*size.runs, *(size.only or ())) if run not in self.runs]
            if unknown:
                raise ValueError(f"size {name} names the run {unknown[0]!r}, which is not among runs")
        return self

    def _check_keys(self) -> None:
        of_sizes = [keys for size in self.sizes.values() for keys in size.runs.values()]
        of_some = {key for keys in (self.grid, *self.runs.values(), *of_sizes) for key in keys}
        for key in sorted(of_some.union(*(size.set for size in self.sizes.values())) & OWN_KEYS.keys()):
            raise ValueError(f"{key} of each run is the sweep's to give: {OWN_KEYS[key]}")
        if "storage" in of_some:
            raise ValueError("storage is where the whole sweep lies: give it by a size's `set`, or --set")


def seeded(name: str, seed: int) -> str:
    """Return a name with a suffix for the seed."""
    return f"{name}-s{seed}"


def unseeded(name: str) -> str:
    """Return a name of `seeded` without its seed suffix; any other name unchanged."""
    return re.sub(r"-s\d+$", "", name)


class SweepRun(Section):
    """One run of a sweep."""

    variant: str
    """Name of the run without its seed, for example h4."""
    seed: NonNegativeInt
    spec: RunSpec

    @property
    def name(self) -> str:
        """Name of the run within the sweep."""
        return seeded(self.variant, self.seed)
