"""Run directory: its paths, functions that create and find runs, and the attempts of a run."""

import os
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from mhmoe_ray.errors import RunError, SpecError, StorageError
from mhmoe_ray.parsing import ParseError, Time, parse_object
from mhmoe_ray.spec import RunSpec, dump_spec, load_resolved_spec
from mhmoe_ray.spec.train import PROFILED_STEPS, ProfiledSteps
from mhmoe_ray.storage import (
    Location,
    ObjectPath,
    explain_error,
    location,
    make_folder,
    matching_paths,
    read_file,
    remove_tree,
    replace_file,
    report_write_errors,
    sync,
    write_json,
)

CHAT_TEMPLATE = "chat_template.jinja"
SPEC_FILE, ATTEMPTS_FILE = "spec.yaml", "run.json"


class PathOf:
    """Attribute of a `RunDir` or `SweepDir` that is the path of one of its files or folders."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, directory: Any, _: type) -> Location:
        folder: Location = directory.path
        return folder / self._name


@dataclass(frozen=True)
class RunDir:
    """Directory of a run, with the paths of its files; the directory itself need not exist.

    Methods that write raise a StorageError if the storage is full, read-only or out of reach.
    """

    path: Location

    spec_file = PathOf(SPEC_FILE)
    attempts_file = PathOf(ATTEMPTS_FILE)
    attempts = PathOf("attempts")
    events_file = PathOf("events.jsonl")
    metrics_file = PathOf("metrics.jsonl")
    logs = PathOf("logs")
    routing = PathOf("routing")
    stacks = PathOf("stacks")
    profiles = PathOf("profiles")
    profile_request_file = PathOf("profile.json")
    tensorboard = PathOf("tensorboard")
    evaluations = PathOf("evaluations")
    tokenizer_file = PathOf("tokenizer.json")
    classes_file = PathOf("classes.json")
    chat_template_file = PathOf(CHAT_TEMPLATE)
    start_file = PathOf("start.json")
    reference_file = PathOf("reference.arrow")
    checkpoints = PathOf("checkpoints")
    stop_file = PathOf("stop")
    ray = PathOf("ray")

    @property
    def id(self) -> str:
        return self.path.name

    @classmethod
    def of_checkpoint(cls, checkpoint: Location) -> "RunDir":
        return cls(checkpoint.parent.parent)

    @property
    def name(self) -> str:
        """Name of the run in its spec: the id without the suffix that `create_empty_run` adds."""
        return self.id.rpartition("-")[0]

    @property
    def is_imported(self) -> bool:
        """True if the run has no spec, attempts or metrics, because it was imported; RunError if it was removed."""
        try:
            return "imported" in self.stored_state()
        except FileNotFoundError as e:
            raise self._removed_error() from e

    def require_existing(self) -> None:
        """Raise a RunError if there is no run, because it was removed, moved, or not submitted or imported yet."""
        if not self.attempts_file.exists():
            raise self._removed_error()

    def _removed_error(self) -> RunError:
        reason = f"it was removed, or moved: there is no {self.attempts_file}"
        return RunError(f"run {self.id}", reason, "see `mhmoe list`")

    def spec(self) -> RunSpec:
        """Read the run's spec, with current paths if the run was moved (`relocated_spec`)."""
        return self.relocated_spec(load_resolved_spec(self.spec_file))

    def relocated_spec(self, spec: RunSpec) -> RunSpec:
        """Return a spec of this run with current paths, if the run was moved together with other folders.

        Paths below the old folder, such as a checkout, become paths below the new one. The spec stays unchanged if the
        run was not moved, if the old folder still exists, or if the run is on an object store.
        """
        old_folder, new_folder = spec.storage, self.path.absolute().parent
        if not (isinstance(old_folder, Path) and isinstance(new_folder, Path)) or old_folder == new_folder:
            return spec
        storage = new_folder
        # Folders with equal names at the end of both paths were moved inside another folder. The loop goes up to the
        # topmost moved folder: its old and new names differ, or its old parent still exists. `os.access` raises no
        # error for a path that this user may not look into, which counts as missing.
        while old_folder.name == new_folder.name and not os.access(old_folder.parent, os.F_OK):
            old_folder, new_folder = old_folder.parent, new_folder.parent
        if os.access(old_folder, os.F_OK):
            return spec

        def new_path(path: Location) -> Location:
            if isinstance(path, ObjectPath) or not path.is_relative_to(old_folder):
                return path
            return new_folder / path.relative_to(old_folder)

        data = spec.data
        sources = {
            name: source
            if "://" in source.path
            else source.model_copy(update={"path": str(new_path(Path(source.path)))})
            for name, source in data.sources.items()
        }
        path_fields = {
            "sources": sources,
            "prepared": new_path(data.prepared),
            "tokenizer": new_path(data.tokenizer) if data.tokenizer else None,
            "chat_template": new_path(data.chat_template) if data.chat_template else None,
        }
        # The sources of a start may also be URIs or names, which `Path` would change.
        start = spec.start and spec.start.with_sources(
            [str(new_path(Path(s))) if Path(s).is_relative_to(old_folder) else s for s in spec.start.sources]
        )
        update = {"storage": storage, "data": data.model_copy(update=path_fields), "start": start}
        return spec.model_copy(update=update)

    def write_spec(self, spec: RunSpec) -> None:
        # The file is replaced in one step, because a partly written spec would leave the run without a description.
        with report_write_errors(self.spec_file):
            replace_file(self.spec_file, dump_spec(spec).encode())

    def request_stop(self) -> None:
        """Create the stop file, which asks the workers to stop."""
        with report_write_errors(self.stop_file):
            self.stop_file.touch()

    def clear_stop(self) -> None:
        """Remove the stop file of an earlier stop, because it would stop a new attempt too."""
        with report_write_errors(self.stop_file):
            self.stop_file.unlink(missing_ok=True)

    def request_profile(self, steps: int) -> None:
        """Ask the workers to profile the next steps."""
        with report_write_errors(self.profile_request_file):
            write_json(self.profile_request_file, {"steps": steps})

    def requested_profile_steps(self) -> int:
        """Return the number of steps to profile; 0 without a request, and the default if the file has no number."""
        try:
            return _STEPS.validate_python(parse_object(read_file(self.profile_request_file))["steps"])
        except FileNotFoundError:
            return 0
        except (ParseError, ValidationError, KeyError):
            return PROFILED_STEPS

    def clear_profile_request(self) -> None:
        with report_write_errors(self.profile_request_file):
            self.profile_request_file.unlink(missing_ok=True)

    def remove(self) -> None:
        with report_write_errors(self.path):
            remove_tree(self.path)

    def creation_time(self) -> float:
        """Return the time of the first attempt or the import, in seconds since the epoch; RunError without one."""
        try:
            state = self.stored_state()
            seconds = state["imported"] if "imported" in state else state["attempts"][0]["submitted"]
            return _TIME.validate_python(seconds)
        except (ValueError, LookupError, TypeError, FileNotFoundError) as e:
            raise self.damage_error(e) from e

    def stored_state(self, name: str = "run.json") -> dict[str, Any]:
        """Return the content of run.json or of such a file; FileNotFoundError without it, RunError if damaged."""
        try:
            return parse_object(read_file(self.path / name))
        except FileNotFoundError:
            raise
        except (OSError, ParseError) as e:
            raise self.damage_error(e, name) from e

    def damage_error(self, error: Exception, name: str = "run.json") -> RunError:
        """Return the error about a file whose content is not that of a run, or a StorageError if it cannot be read."""
        cause = error.strerror if isinstance(error, OSError) else "it is damaged, or written by another program"
        reason = f"its {name} cannot be read ({cause})"
        error_type = StorageError if isinstance(error, OSError) else RunError
        return error_type(f"run {self.id}", reason, f"repair that file, or remove the folder {self.path}")


def create_run(spec: RunSpec) -> RunDir:
    """Create the directory of a run that has not begun, with its spec; remove it again if an error occurs.

    A storage folder that cannot be written is a SpecError. A spec that cannot be written, for example on a full disk,
    is a StorageError.
    """
    run = create_empty_run(spec.storage, spec.name)
    try:
        with report_write_errors(run.routing):
            run.routing.mkdir()
        run.write_spec(spec)
    except StorageError:
        with suppress(StorageError):
            run.remove()
        raise
    return run


def create_empty_run(storage: Location, name: str) -> RunDir:
    """Create a run directory for its owner alone, without a spec; an unwritable storage folder is a SpecError."""
    try:
        make_folder(storage)
        # A new id is drawn until no run has it, because two runs may get the same six hexadecimal digits.
        while (run := RunDir(storage / f"{name}-{secrets.token_hex(3)}")).path.exists():
            pass
        run.path.mkdir(mode=0o700)
        sync(storage)
        run.checkpoints.mkdir()
    except OSError as e:
        raise SpecError(f"storage {storage}", *explain_error(e, "set storage to a folder you can write")) from e
    return run


def list_runs(storage: Location | str) -> list[RunDir]:
    """Return the runs in the folder `storage`, oldest first, and warn on stderr of each unreadable run.json."""
    creation_times: dict[RunDir, float] = {}
    with report_read_errors(storage):
        for run in (RunDir(p.parent) for p in location(storage).absolute().glob("*/run.json")):
            try:
                creation_times[run] = run.creation_time()
            except RunError as e:
                # If this file (run.json) is missing by now, the run was removed meanwhile, so no warning is needed.
                if run.attempts_file.exists():
                    print(f"warning: {e}", file=sys.stderr)
    return sorted(creation_times, key=creation_times.__getitem__)


@contextmanager
def report_read_errors(storage: Location | str) -> Iterator[None]:
    """Context manager that turns an OSError into a StorageError about reading `storage`."""
    try:
        yield
    except OSError as e:
        fix = "check the address, and the credentials in the environment"
        raise StorageError(f"storage {storage}", *explain_error(e, fix)) from e


def find_run(name: str | None, storage: Location | str, *, with_job: bool = False) -> RunDir:
    """Return the run with this id, unique prefix of an id, or path; without a name, the newest run.

    With `with_job`, the newest run must have a job, which imported runs lack. A missing, ambiguous or unreadable run is
    a RunError, and storage that cannot be read is a StorageError.
    """
    if name is not None:
        for candidate in (location(name), location(storage) / name):
            with report_read_errors(candidate):
                if (run := RunDir(candidate.absolute())).attempts_file.is_file():
                    # This call only checks run.json: it raises a RunError if the file cannot be read.
                    run.creation_time()
                    return run
    runs = list_runs(storage)
    if name is None:
        runs = [r for r in runs if not (with_job and r.is_imported)]
        if not runs:
            raise RunError(
                f"storage {storage}", "it holds no run yet", "start one: mhmoe init, then mhmoe submit spec.yaml"
            )
        return runs[-1]
    matching_runs = [r for r in runs if r.id == name] or [r for r in runs if r.id.startswith(name)]
    if len(matching_runs) == 1:
        return matching_runs[0]
    if "@" in name:
        fix = "leave out @STEP: this command is about the run, not about one of its checkpoints"
        raise RunError(f"run {name}", f"there is no run of this name in {storage}", fix)
    if Path(name).is_file():
        raise RunError(f"run {name}", "it is a file, and a run is named by its id", "see the ids: mhmoe list")
    reason = (
        f"it fits {', '.join(r.id for r in matching_runs)}" if matching_runs else f"there is no such run in {storage}"
    )
    raise RunError(f"run {name}", reason, "see `mhmoe list`, or name the folder that holds it (storage, MHMOE_STORAGE)")


@dataclass(frozen=True)
class Attempt:
    """Attempt of a run: a job that `mhmoe submit` or `mhmoe resume` started."""

    job: str
    address: str
    """URL of the cluster's dashboard."""
    local: bool
    """True for the local cluster, which this package starts on the machine of the user's command."""
    submitted: Time = field(default_factory=time.time)
    """Time in seconds since the epoch."""
    token: str = ""
    """Random text; on an object store, two attempts may have the same number. Older runs have none."""


class AttemptId(NamedTuple):
    """Identity of an attempt: its number, counted from 1, and its token."""

    number: int
    token: str = ""


_ATTEMPTS = TypeAdapter(list[Attempt])
_TIME: TypeAdapter[float] = TypeAdapter(Time)
_STEPS: TypeAdapter[int] = TypeAdapter(ProfiledSteps)


def read_attempts(run: RunDir) -> list[Attempt]:
    """Return all attempts of a run, oldest first; none if it was not submitted yet or was imported."""
    if not run.attempts_file.exists():
        return []
    name = max((f"attempts/{path.name}" for path in matching_paths(run.attempts, "*.json")), default="run.json")
    try:
        return _ATTEMPTS.validate_python(run.stored_state(name)["attempts"])
    except (ValidationError, KeyError) as e:
        raise run.damage_error(e, name) from e


def last_attempt(run: RunDir) -> Attempt:
    """Return the newest attempt of a run; an imported run has none, which is a RunError."""
    if run.is_imported:
        reason = "it was imported, not trained here, so it has no job"
        raise RunError(f"run {run.id}", reason, "serve it with `mhmoe serve deploy`, or name another run")
    return read_attempts(run)[-1]


def newest_attempt_number(run: RunDir) -> int:
    """Return the number of the run's newest attempt, counted from 1; 0 for a run without attempts."""
    return len(read_attempts(run))


def is_newest_attempt(run: RunDir, attempt: AttemptId) -> bool:
    """Return whether a run has neither a newer attempt, nor another one of the same number."""
    attempts = read_attempts(run)
    return len(attempts) < attempt.number or (len(attempts), attempts[-1].token) == attempt


def require_newest_attempt(run: RunDir, attempt: AttemptId) -> None:
    """Raise a RunError if there is a newer attempt, because the job of an older one must write nothing more."""
    if not is_newest_attempt(run, attempt):
        raise RunError(f"run {run.id}", "it was resumed elsewhere", "leave it to the newer job")


def add_attempt(run: RunDir, attempt: Attempt, number: int | None = None) -> None:
    """Add an attempt, by default the next one; a failed write is a StorageError, an existing number a RunError."""
    attempts = [*read_attempts(run), attempt]
    number = number or len(attempts)
    path = run.attempts_file if number == 1 else run.attempts / f"{number:06d}.json"
    with report_write_errors(path):
        try:
            write_json(path, {"id": run.id, "attempts": [asdict(a) for a in attempts]}, is_new=number > 1)
        except FileExistsError as e:
            if number == 1:
                raise
            reason = "another command resumed it at the same moment"
            raise RunError(f"run {run.id}", reason, "see `mhmoe status`") from e


def mark_imported(run: RunDir) -> None:
    """Write the run.json of an imported run; from then on the directory counts as a run."""
    write_json(run.attempts_file, {"id": run.id, "attempts": [], "imported": time.time()})
