"""run.json: which cluster and job belong to each attempt (a submit or a resume) of a run, or when it was imported."""

import json
import time
from dataclasses import asdict, dataclass, field

from mhmoe_ray.errors import RunError
from mhmoe_ray.runs.layout import RunDir
from mhmoe_ray.storage import write_json


@dataclass(frozen=True)
class Attempt:
    job: str
    """Ray's submission id."""
    address: str
    """The cluster's dashboard, http(s)."""
    local: bool
    """We started that cluster, on the machine of the command."""
    submitted: float = field(default_factory=time.time)


def read_attempts(run: RunDir) -> list[Attempt]:
    if not run.attempts_file.exists():
        return []
    return [Attempt(**a) for a in json.loads(run.attempts_file.read_text())["attempts"]]


def last_attempt(run: RunDir) -> Attempt:
    """The newest attempt of a run.

    Raises:
        RunError: the run was imported, so there is none.
    """
    if run.is_imported:
        why = "it was imported, not trained here, so it has no job"
        raise RunError(f"run {run.id}", why, "serve it with `mhmoe serve deploy`, or name another run")
    return read_attempts(run)[-1]


def newest_number(run: RunDir) -> int:
    """Of its attempts, from 1; 0 without any."""
    return len(read_attempts(run))


def require_newest(run: RunDir, attempt: int) -> None:
    """Raises:
    RunError: there is an attempt after this one.
    """
    if newest_number(run) > attempt:
        raise RunError(f"run {run.id}", "it was resumed elsewhere", "leave it to the newer job")


def add_attempt(run: RunDir, attempt: Attempt) -> None:
    """Record an attempt."""
    attempts = [*read_attempts(run), attempt]
    write_json(run.attempts_file, {"id": run.id, "attempts": [asdict(a) for a in attempts]})


def mark_imported(run: RunDir) -> None:
    """From now on it counts as a run."""
    write_json(run.attempts_file, {"id": run.id, "attempts": [], "imported": time.time()})
