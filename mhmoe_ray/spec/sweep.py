"""A sweep: many runs that differ in some keys of the spec, each with several seeds."""

import re
from pathlib import Path
from typing import Any, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from mhmoe_ray.spec.base import Section
from mhmoe_ray.spec.run import RunSpec

Overrides = dict[str, Any]
"""Values by dotted key of a spec (`train.steps`), shorthands such as `preset` among them."""
OWN_KEYS = {"name": "it is made of names here", "seed": "use seeds"}
"""Keys of a spec that a sweep gives each of its runs, and what to do instead."""


class SweepSize(Section):
    """What all runs of a sweep have in common, at one size."""

    spec: Path
    """Their spec; a relative path is taken from the folder of the sweep's file."""
    set: Overrides = Field(default_factory=dict)
    """Keys that this size changes in it."""
    runs: dict[str, Overrides] = Field(default_factory=dict)
    """Keys that it changes in single runs, by the run's name."""
    only: list[str] | None = Field(default=None, min_length=1)
    """Names of the runs that there are at this size; by default all."""


class SweepSpec(Section):
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,20}$")
    """Lower-case letters, digits and dashes; runs are named after it."""
    sizes: dict[str, SweepSize] = Field(min_length=1)
    """By name; the first is the default."""
    runs: dict[str, Overrides] = Field(default_factory=dict)
    """By name, the keys in which a run differs."""
    grid: dict[str, list[Any]] = Field(default_factory=dict)
    """Values by key; each of `runs`, or the spec itself without any, is run with every combination of them."""
    seeds: list[NonNegativeInt] = Field(default=[0], min_length=1)
    concurrent: PositiveInt = 1
    """Runs at a time."""

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
    """The name of what is called so, with this seed."""
    return f"{name}-s{seed}"


def unseeded(name: str) -> str:
    """A name of `seeded` without its seed; any other as it is."""
    return re.sub(r"-s\d+$", "", name)


class SweepRun(Section):
    """One of the runs that a sweep comes to."""

    variant: str
    """What it is but for its seed, for example h4."""
    seed: NonNegativeInt
    spec: RunSpec

    @property
    def name(self) -> str:
        """Within the sweep."""
        return seeded(self.variant, self.seed)
