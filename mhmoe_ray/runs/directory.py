"""The run directory: the paths in it, how runs are created and found, and the attempts that run.json records."""

import json
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mhmoe_ray.errors import RunError, SpecError, StorageError
from mhmoe_ray.spec import RunSpec, dump_spec, load_resolved_spec
from mhmoe_ray.storage import Location, location, remove_tree, replace_file, write_json

CHAT_TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True)
class RunDir:
    path: Location

    @property
    def id(self) -> str:
        return self.path.name

    @classmethod
    def of_checkpoint(cls, checkpoint: Location) -> "RunDir":
        """Return the run that a checkpoint lies in."""
        return cls(checkpoint.parent.parent)

    @property
    def name(self) -> str:
        """Name in the run's spec: the id without the suffix that `new_directory` adds."""
        return self.id.rpartition("-")[0]

    @property
    def spec_file(self) -> Location:
        return self.path / "spec.yaml"

    @property
    def attempts_file(self) -> Location:
        return self.path / "run.json"

    @property
    def events_file(self) -> Location:
        return self.path / "events.jsonl"

    @property
    def metrics_file(self) -> Location:
        return self.path / "metrics.jsonl"

    @property
    def logs(self) -> Location:
        return self.path / "logs"

    @property
    def routing(self) -> Location:
        return self.path / "routing"

    @property
    def tensorboard(self) -> Location:
        return self.path / "tensorboard"

    @property
    def evaluations(self) -> Location:
        return self.path / "evaluations"

    @property
    def tokenizer_file(self) -> Location:
        return self.path / "tokenizer.json"

    @property
    def chat_template_file(self) -> Location:
        """Path of the Jinja template that turns a conversation into a prompt, for models that have one."""
        return self.path / CHAT_TEMPLATE

    @property
    def checkpoints(self) -> Location:
        return self.path / "checkpoints"

    @property
    def stop_file(self) -> Location:
        return self.path / "stop"

    @property
    def ray(self) -> Location:
        return self.path / "ray"

    @property
    def is_imported(self) -> bool:
        """Whether the run came from other weights and was never trained: it has no spec, no attempts and no metrics."""
        return "imported" in json.loads(self.attempts_file.read_text())

    def spec(self) -> RunSpec:
        return self.relocated(load_resolved_spec(self.spec_file))

    def relocated(self, spec: RunSpec) -> RunSpec:
        """Return the spec of a run whose folder may have been moved together with others, such as a whole checkout.

        Paths below the folder that is gone become paths below the folder that holds the run now. The spec is returned
        as it is if the run was not moved, if the old folder still exists, or if the run is on an object store.
        """
        old, new = spec.storage, self.path.absolute().parent
        if not (isinstance(old, Path) and isinstance(new, Path)) or old == new:
            return spec
        storage = new
        while old.name == new.name and old != old.parent:
            old, new = old.parent, new.parent
        if old.exists():
            return spec

        def moved(path: Path) -> Path:
            return new / path.relative_to(old) if path.is_relative_to(old) else path

        data = spec.data
        sources = {
            name: source if "://" in source.path else source.model_copy(update={"path": str(moved(Path(source.path)))})
            for name, source in data.sources.items()
        }
        tokenizer = moved(data.tokenizer) if data.tokenizer else None
        paths = {"sources": sources, "prepared": moved(data.prepared), "tokenizer": tokenizer}
        return spec.model_copy(update={"storage": storage, "data": data.model_copy(update=paths)})

    def write_spec(self, spec: RunSpec) -> None:
        """Write the spec in one step, because it is the run's only description."""
        replace_file(self.spec_file, dump_spec(spec).encode())

    def created(self) -> float:
        """Return the time of the run's first attempt or of its import, in seconds since the epoch.

        Raises:
            RunError: run.json cannot be read or does not hold this time.
        """
        try:
            state = json.loads(self.attempts_file.read_text())
            return float(state["imported"] if "imported" in state else state["attempts"][0]["submitted"])
        except (ValueError, LookupError, TypeError, FileNotFoundError, PermissionError) as e:
            told = e.strerror if isinstance(e, OSError) else "it is damaged, or not ours"
            why = f"its {self.attempts_file.name} cannot be read ({told})"
            raise RunError(f"run {self.id}", why, f"mend that file, or remove the folder {self.path}") from e


def create_run(spec: RunSpec) -> RunDir:
    """Create a new run directory for training.

    Raises:
        SpecError: the storage folder cannot be written.
    """
    run = new_directory(spec.storage, spec.name)
    try:
        run.routing.mkdir()
        run.write_spec(spec)
    except OSError:
        with suppress(OSError):
            remove_tree(run.path)
        raise
    return run


def new_directory(storage: Location, name: str) -> RunDir:
    """Create an empty run directory, readable by its owner only, with an id that no other run has.

    Raises:
        SpecError: the storage folder cannot be written.
    """
    try:
        storage.mkdir(parents=True, exist_ok=True)
        while (run := RunDir(storage / f"{name}-{secrets.token_hex(3)}")).path.exists():
            pass
        run.path.mkdir(mode=0o700)
        run.checkpoints.mkdir()
    except OSError as e:
        raise SpecError(f"storage {storage}", e.strerror or str(e), "set storage to a folder you can write") from e
    return run


def list_runs(storage: Location | str) -> list[RunDir]:
    """Return the runs below `storage`, oldest first.

    A run whose run.json cannot be read is left out, with a warning on stderr.

    Raises:
        StorageError: the storage cannot be read.
    """
    found: dict[RunDir, float] = {}
    with _reading(storage):
        for run in (RunDir(p.parent) for p in location(storage).absolute().glob("*/run.json")):
            try:
                found[run] = run.created()
            except RunError as e:
                if run.attempts_file.exists():  # else the run was removed meanwhile
                    print(f"warning: {e}", file=sys.stderr)
    return sorted(found, key=found.__getitem__)


@contextmanager
def _reading(storage: Location | str) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        fix = "check the address, and the credentials in the environment"
        raise StorageError(f"storage {storage}", e.strerror or " ".join(str(e).split()), fix) from e


def find_run(name: str | None, storage: Location | str, *, with_job: bool = False) -> RunDir:
    """Return the run with this id, unique prefix of an id, or path; without a name, the newest run.

    Args:
        name: id, prefix or path, as a user gives it.
        storage: folder that holds run directories.
        with_job: without a name, whether the newest run must have been trained here, not imported.

    Raises:
        RunError: there is no such run, the prefix fits several, or the run.json of that id or path cannot be read.
        StorageError: the storage cannot be read.
    """
    if name is not None:
        for place in (location(name), location(storage) / name):
            with _reading(place):
                if (run := RunDir(place.absolute())).attempts_file.is_file():
                    run.created()
                    return run
    runs = list_runs(storage)
    if name is None:
        runs = [r for r in runs if not (with_job and r.is_imported)]
        if not runs:
            raise RunError(f"storage {storage}", "it holds no run yet", "start one: mhmoe submit jobs/quickstart.yaml")
        return runs[-1]
    fitting = [r for r in runs if r.id == name] or [r for r in runs if r.id.startswith(name)]
    if len(fitting) == 1:
        return fitting[0]
    why = f"it fits {', '.join(r.id for r in fitting)}" if fitting else f"there is no such run in {storage}"
    raise RunError(f"run {name}", why, "see `mhmoe list`, or name another folder with --storage")


@dataclass(frozen=True)
class Attempt:
    job: str
    """Submission id of the job in Ray."""
    address: str
    """Address of the cluster's dashboard, http(s)."""
    local: bool
    """Whether this package started that cluster, on the machine of the command."""
    submitted: float = field(default_factory=time.time)


def read_attempts(run: RunDir) -> list[Attempt]:
    if not run.attempts_file.exists():
        return []
    return [Attempt(**a) for a in json.loads(run.attempts_file.read_text())["attempts"]]


def last_attempt(run: RunDir) -> Attempt:
    """Return the newest attempt of a run.

    Raises:
        RunError: the run was imported, so it has no attempt.
    """
    if run.is_imported:
        why = "it was imported, not trained here, so it has no job"
        raise RunError(f"run {run.id}", why, "serve it with `mhmoe serve deploy`, or name another run")
    return read_attempts(run)[-1]


def newest_number(run: RunDir) -> int:
    """Return the number of the run's newest attempt, counted from 1; 0 without any."""
    return len(read_attempts(run))


def require_newest(run: RunDir, attempt: int) -> None:
    """Check that an attempt is the newest one of its run.

    Raises:
        RunError: there is an attempt after this one.
    """
    if newest_number(run) > attempt:
        raise RunError(f"run {run.id}", "it was resumed elsewhere", "leave it to the newer job")


def add_attempt(run: RunDir, attempt: Attempt) -> None:
    """Add an attempt to run.json."""
    attempts = [*read_attempts(run), attempt]
    write_json(run.attempts_file, {"id": run.id, "attempts": [asdict(a) for a in attempts]})


def mark_imported(run: RunDir) -> None:
    """Write the run.json of an imported run, with the present time; from now on the directory counts as a run."""
    write_json(run.attempts_file, {"id": run.id, "attempts": [], "imported": time.time()})
