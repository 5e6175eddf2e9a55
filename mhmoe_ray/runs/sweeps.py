"""The directory of a sweep: the orders of commands, and the run directories that became of them.

<storage>/sweeps/<name>/
  orders/000001-3f2a1c.json   written by a command: which runs, how many at a time, and the job that starts them
  runs.json                   written by the job whose order is the last: the run directory of each entry
  stop                        present while a user asks that no more runs start

Commands may run at the same moment and on several machines. So each writes an order of its own, once; the names of the
orders alone say which one counts.
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
    """Number of runs at a time."""
    entries: list[SweepRun]
    """All entries of the sweep file."""
    wanted: list[str]
    """Names of the entries that are to run."""
    retry: dict[str, int]
    """Number of the last attempt of each run that had failed or been stopped at the time of the order, by entry: these
    runs start again once."""
    job: str
    address: str
    """Address of the cluster's dashboard, as commands reach it."""
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
        """Return the names of all orders, in order.

        The last one counts, and the jobs of the others make way for its job.
        """
        return sorted(path.name.removesuffix(".json") for path in self.orders_folder.glob("*.json"))

    def new_order(self) -> str:
        """Return a name for an order that comes after all existing ones.

        Two orders of the same moment have the same number but different names, and every process sees the same one as
        the last.
        """
        last = max((int(name.partition("-")[0]) for name in self.orders()), default=0)
        return f"{last + 1:06d}-{secrets.token_hex(3)}"

    def order(self, name: str) -> Order:
        """Return the order of this name.

        Raises:
            FileNotFoundError: the order is not written yet.
            RunError: the order is damaged, or was written by another version.
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
        """Yield the orders before this one, or all orders without a name.

        Orders that another version of this package wrote are left out.
        """
        names = self.orders()
        for earlier in names[: names.index(name) if name else None]:
            with suppress(RunError):
                yield self.order(earlier)

    def entries(self) -> list[SweepRun]:
        """Return the entries of the last order, and those of earlier orders that were started and are not in the last
        one."""
        started, last = self.runs(), self.orders()[-1]
        found = {entry.name: entry for entry in self.order(last).entries}
        for order in reversed([*self.orders_before(last)]):
            for entry in order.entries:
                if entry.name in started:
                    found.setdefault(entry.name, entry)
        return list(found.values())

    def runs(self) -> dict[str, RunDir]:
        """Return the runs of the entries that were started, by the names of the entries, without runs that were removed
        since."""
        if not self.runs_file.exists():
            return {}
        found: dict[str, str] = json.loads(self.runs_file.read_text())
        runs = {entry: RunDir(self.path.parent.parent / run) for entry, run in found.items()}
        return {entry: run for entry, run in runs.items() if run.spec_file.exists()}

    def write_runs(self, runs: Mapping[str, RunDir]) -> None:
        write_json(self.runs_file, {entry: run.id for entry, run in runs.items()})


def sweep_dir(storage: Location, name: str) -> SweepDir:
    return SweepDir(storage / "sweeps" / name)
