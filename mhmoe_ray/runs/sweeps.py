"""Directory of a sweep: orders to start runs, which commands write, and the run directory of each started entry.

<storage>/sweeps/<name>/
  orders/000001-3f2a1c.json   written by a command: the runs, how many at a time, and the job that starts them
  runs.json                   written by the job of the last order: the run directory of each entry
  stop                        present while a user asks that no more runs start

An entry is a run that the sweep file describes: a variant with one seed. Commands may run at the same moment and on
several machines, so each writes its own order once, and the names of the orders alone determine which order counts.
"""

import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pydantic import BaseModel, TypeAdapter, ValidationError

from mhmoe_ray.errors import RunError, StorageError
from mhmoe_ray.parsing import parse_json
from mhmoe_ray.runs.directory import PathOf, RunDir, report_read_errors
from mhmoe_ray.spec import SweepRun
from mhmoe_ray.storage import Location, matching_paths, read_file, report_write_errors, write_json


class SweepOrder(BaseModel):
    """Order to start runs of a sweep, which a command writes and a job carries out."""

    size: str
    """Name of the size in the sweep file."""
    concurrent: int
    """Largest number of runs that train at the same time."""
    entries: list[SweepRun]
    """Runs of the sweep file, and unfinished runs of an earlier order that this one replaces."""
    wanted: list[str]
    """Names of the entries that the job is to run."""
    retry: dict[str, int]
    """Number of the last attempt of each entry that had failed or was stopped then; each is retried once."""
    job: str
    address: str
    """Address of the cluster's dashboard, as the user's commands reach it."""
    local: bool
    """True for the local cluster, which this package starts on the machine of the user's command."""
    submitted: float
    """Time in seconds since the epoch."""

    @property
    def wanted_entries(self) -> list[SweepRun]:
        return [entry for entry in self.entries if entry.name in set(self.wanted)]


_RUN_IDS = TypeAdapter(dict[str, str])


@dataclass(frozen=True)
class SweepDir:
    """Directory of a sweep, which may be missing; methods that read or write files can raise a StorageError."""

    path: Location

    orders_folder = PathOf("orders")
    runs_file = PathOf("runs.json")
    stop_file = PathOf("stop")

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def exists(self) -> bool:
        return bool(self.order_names())

    def order_names(self) -> list[str]:
        """Return the names of all orders, oldest first; the jobs of earlier ones give way to the job of the last."""
        with report_read_errors(self.orders_folder):
            return sorted(path.name.removesuffix(".json") for path in matching_paths(self.orders_folder, "*.json"))

    def new_order_name(self) -> str:
        """Return a name for a new order, which sorts after all existing ones."""
        # Two commands may take the same number at the same moment. The random suffix makes their names different, and
        # all processes sort these names in the same order.
        last_number = max((int(name.partition("-")[0]) for name in self.order_names()), default=0)
        return f"{last_number + 1:06d}-{secrets.token_hex(3)}"

    def read_order(self, name: str) -> SweepOrder:
        """Return an order; one that is damaged, or of another version, is a RunError."""
        path = self.orders_folder / f"{name}.json"
        with report_read_errors(path):
            content = read_file(path)
        try:
            return SweepOrder.model_validate_json(content)
        except ValidationError as e:
            subject = f"sweep {self.name}, order {name}"
            fix = "repeat the sweep's command, or use the version that wrote the order"
            raise RunError(subject, "it is damaged, or written by another version", fix) from e

    def write_order(self, name: str, order: SweepOrder) -> None:
        path = self.orders_folder / f"{name}.json"
        with report_write_errors(path):
            write_json(path, order.model_dump(mode="json"))

    def earlier_orders(self, name: str | None = None) -> Iterator[SweepOrder]:
        """Yield the orders before `name`, or all orders, oldest first; skip damaged ones."""
        names = self.order_names()
        for earlier_name in names[: names.index(name) if name else None]:
            try:
                yield self.read_order(earlier_name)
            except StorageError:
                raise
            except RunError:
                continue

    def entries(self) -> list[SweepRun]:
        """Return the runs of the last order, and those started runs of earlier orders that it lacks."""
        started_runs, last_order = self.runs(), self.order_names()[-1]
        entries_by_name = {entry.name: entry for entry in self.read_order(last_order).entries}
        # The newest order comes first, because `setdefault` keeps the first definition of an entry and the newest one
        # must count.
        for order in reversed([*self.earlier_orders(last_order)]):
            for entry in order.entries:
                if entry.name in started_runs:
                    entries_by_name.setdefault(entry.name, entry)
        return list(entries_by_name.values())

    def runs(self) -> dict[str, RunDir]:
        """Return the started runs by the names of their entries, without removed ones."""
        with report_read_errors(self.runs_file):
            if not self.runs_file.exists():
                return {}
            try:
                run_ids = _RUN_IDS.validate_python(parse_json(read_file(self.runs_file)))
            except ValueError as e:
                fix = f"repair it, or remove it, which starts all runs again: {self.runs_file}"
                raise RunError(f"sweep {self.name}", f"its {self.runs_file.name} is damaged", fix) from e
            runs = {entry: RunDir(self.path.parent.parent / run) for entry, run in run_ids.items()}
            return {entry: run for entry, run in runs.items() if run.spec_file.exists()}

    def write_runs(self, runs: Mapping[str, RunDir]) -> None:
        with report_write_errors(self.runs_file):
            write_json(self.runs_file, {entry: run.id for entry, run in runs.items()})


def sweep_dir(storage: Location, name: str) -> SweepDir:
    """Return the directory of a sweep in `storage`, which also holds its runs; nothing is created."""
    return SweepDir(storage / "sweeps" / name)
