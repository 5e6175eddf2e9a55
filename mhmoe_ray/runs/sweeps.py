"""The directory of a sweep: which runs it is to have, and which run directories they became.

<storage>/sweeps/<name>/
  sweep.json     written by commands: the runs, how many at a time, and the jobs that start them
  runs.json      written by the job that starts them: which run directory each is
  stop           present while somebody asks that no more runs start
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import BaseModel

from mhmoe_ray.location import Location
from mhmoe_ray.runs.files import write_json
from mhmoe_ray.runs.layout import RunDir
from mhmoe_ray.spec import SweepRun


class SweepJob(BaseModel):
    job: str
    address: str
    """The cluster's dashboard, as commands reach it."""
    local: bool
    submitted: float
    retry: bool = True
    """Whether it starts those again that failed or were stopped before."""


class Definition(BaseModel):
    size: str
    concurrent: int
    entries: list[SweepRun]
    """All that the file has, and those that were started when it had them."""
    wanted: list[str]
    """Names of those that are to run now."""
    jobs: list[SweepJob] = []
    """The last one starts runs; others have made way for it."""

    @property
    def wanted_entries(self) -> list[SweepRun]:
        return [entry for entry in self.entries if entry.name in set(self.wanted)]


@dataclass(frozen=True)
class SweepDir:
    path: Location

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def definition_file(self) -> Location:
        return self.path / "sweep.json"

    @property
    def runs_file(self) -> Location:
        return self.path / "runs.json"

    @property
    def stop_file(self) -> Location:
        return self.path / "stop"

    @property
    def exists(self) -> bool:
        return self.definition_file.exists()

    def definition(self) -> Definition:
        return Definition.model_validate_json(self.definition_file.read_text())

    def define(self, definition: Definition) -> None:
        write_json(self.definition_file, definition.model_dump(mode="json"))

    def runs(self) -> dict[str, RunDir]:
        """By the names of the entries that were started; without those that were removed since."""
        if not self.runs_file.exists():
            return {}
        found: dict[str, str] = json.loads(self.runs_file.read_text())
        runs = {entry: RunDir(self.path.parent.parent / run) for entry, run in found.items()}
        return {entry: run for entry, run in runs.items() if run.spec_file.exists()}

    def write_runs(self, runs: Mapping[str, RunDir]) -> None:
        write_json(self.runs_file, {entry: run.id for entry, run in runs.items()})


def sweep_dir(storage: Location, name: str) -> SweepDir:
    return SweepDir(storage / "sweeps" / name)
