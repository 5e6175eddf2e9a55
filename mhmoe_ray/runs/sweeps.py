"""The directory of a sweep: what commands asked for, and which run directories that became.

<storage>/sweeps/<name>/
  orders/000001-3f2a1c.json   by a command: which runs, how many at a time, and the job that starts them
  runs.json                   by the job whose order is the last: which run directory each is
  stop                        present while somebody asks that no more runs start

Commands may come at the same moment and from several machines. So each writes an order of its own, once; which one
counts is told by their names alone.
"""

import json
import secrets
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

from pydantic import BaseModel, ValidationError

from mhmoe_ray.errors import RunError
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.spec import SweepRun
from mhmoe_ray.storage import Location, write_json


class Order(BaseModel):
    size: str
    concurrent: int
    """Runs at a time."""
    entries: list[SweepRun]
    """All that the file had."""
    wanted: list[str]
    """Names of those that are to run."""
    retry: dict[str, int]
    """Of those that had failed, or been stopped, the number of their last attempt then: they start again once."""
    job: str
    address: str
    """The cluster's dashboard, as commands reach it."""
    local: bool
    submitted: float

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
    def orders_folder(self) -> Location:
        return self.path / "orders"

    @property
    def runs_file(self) -> Location:
        return self.path / "runs.json"

    @property
    def stop_file(self) -> Location:
        return self.path / "stop"

    @property
    def exists(self) -> bool:
        return bool(self.orders())

    def orders(self) -> list[str]:
        """Their names; the last one counts, and the jobs of others make way for its own."""
        return sorted(path.name.removesuffix(".json") for path in self.orders_folder.glob("*.json"))

    def new_order(self) -> str:
        """A name for one that comes after all that there are. Two of the same moment have a number in common, but no
        name, and everybody sees the same of them as the last."""
        last = max((int(name.partition("-")[0]) for name in self.orders()), default=0)
        return f"{last + 1:06d}-{secrets.token_hex(3)}"

    def order(self, name: str) -> Order:
        """Raises:
        FileNotFoundError: it is not written yet.
        RunError: it cannot be read.
        """
        text = (self.orders_folder / f"{name}.json").read_text()
        try:
            return Order.model_validate_json(text)
        except ValidationError as e:
            what = f"sweep {self.name}, order {name}"
            fix = "give the sweep's command again, or go on with the version that wrote it"
            raise RunError(what, "it is damaged, or of another version", fix) from e

    def write_order(self, name: str, order: Order) -> None:
        write_json(self.orders_folder / f"{name}.json", order.model_dump(mode="json"))

    def orders_before(self, name: str | None = None) -> Iterator[Order]:
        """Those before this one, else all; without those that another version of this package wrote."""
        names = self.orders()
        for earlier in names[: names.index(name) if name else None]:
            with suppress(RunError):
                yield self.order(earlier)

    def entries(self) -> list[SweepRun]:
        """Those of the last order, and those of earlier ones that were started and are not in it any more."""
        started, last = self.runs(), self.orders()[-1]
        found = {entry.name: entry for entry in self.order(last).entries}
        for order in reversed([*self.orders_before(last)]):
            for entry in order.entries:
                if entry.name in started:
                    found.setdefault(entry.name, entry)
        return list(found.values())

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
