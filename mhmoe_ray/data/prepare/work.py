"""The staging directories of a preparation, its progress report, and publishing the result under its name.

    <prepared>.partial-<hash of the settings>/
      parts/           tokens of chunks, named by content: a job reuses the parts that earlier jobs left
      progress.json
      <a job's own>/   quarantine/; prepared/, the result; alive, the job's heartbeat file

Several jobs may work here at once: they share only the parts, each of which is written in one step, and two parts of
one name are equal. The first job with a complete result publishes it and cleans up; the others find the published
folder and use it.
"""

import errno
import glob
import hashlib
import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ValidationError

from mhmoe_ray.data.shards.manifest import recipe
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.storage import replace_file

FILE = "progress.json"
EVERY_SECONDS = 1.0

Stage = Literal["tokenizer", "tokenising", "packing", "finishing"]


class PreparationProgress(BaseModel):
    stage: Stage
    done: int
    """Progress of the stage: stored bytes while tokenising, shards while packing."""
    total: int
    documents: int
    tokens: int
    found_tokens: int
    """Number of those tokens that an earlier attempt left."""
    bytes_per_s: float
    """Stored bytes tokenised per second by this attempt."""
    seconds_left: float | None
    """Estimated seconds until tokenising ends; None while there is no estimate."""


@dataclass
class Report:
    """Progress report that keeps progress.json up to date."""

    folder: Path
    total_bytes: int
    stage: Stage = "tokenizer"
    done_bytes: int = 0
    found_bytes: int = 0
    documents: int = 0
    tokens: int = 0
    found_tokens: int = 0
    shards: int = 0
    total_shards: int = 0
    _began: float = field(default_factory=time.monotonic)
    _written: float = 0.0

    def enter(self, stage: Stage) -> None:
        self.stage, self._began = stage, time.monotonic()
        self.write()

    def refresh(self) -> None:
        if time.monotonic() - self._written >= EVERY_SECONDS:
            self.write()

    def write(self) -> None:
        self._written = time.monotonic()
        seconds = max(self._written - self._began, 1e-3)
        made = self.done_bytes - self.found_bytes
        packing = self.stage == "packing"
        progress = PreparationProgress(
            stage=self.stage,
            done=self.shards if packing else self.done_bytes,
            total=self.total_shards if packing else self.total_bytes,
            documents=self.documents,
            tokens=self.tokens,
            found_tokens=self.found_tokens,
            bytes_per_s=made / seconds if self.stage == "tokenising" else 0.0,
            seconds_left=(self.total_bytes - self.done_bytes) * seconds / made
            if made and self.stage == "tokenising"
            else None,
        )
        replace_file(self.folder / FILE, progress.model_dump_json().encode())


def read_progress(folder: Path) -> PreparationProgress | None:
    """Return the progress of a preparation, or None where nothing is being prepared."""
    try:
        return PreparationProgress.model_validate_json((folder / FILE).read_bytes())
    except (OSError, ValidationError):
        return None


ALIVE = "alive"
ALIVE_SECONDS = 20.0
"""Seconds between two heartbeats."""
DEAD_SECONDS = 1200.0
"""Seconds without a heartbeat after which a job counts as dead."""


class Workplace(NamedTuple):
    shared: Path
    """Staging directory that all jobs with these settings share."""
    own: Path
    """Staging directory of this job."""

    @property
    def parts(self) -> Path:
        return self.shared / "parts"

    @property
    def quarantine(self) -> Path:
        return self.own / "quarantine"

    @property
    def result(self) -> Path:
        return self.own / "prepared"


def shared_folder(spec: RunSpec) -> Path:
    digest = hashlib.sha256(json.dumps(recipe(spec), sort_keys=True).encode()).hexdigest()
    return spec.data.prepared.with_name(f"{spec.data.prepared.name}.partial-{digest[:8]}")


@contextmanager
def at_work(spec: RunSpec) -> Iterator[Workplace]:
    """Create the staging directory of a new job, keep its heartbeat while the context lasts, and remove it at the end.

    Meanwhile the job also removes the staging directories of dead jobs, with all that they had packed.
    """
    place = Workplace(shared := shared_folder(spec), shared / secrets.token_hex(4))
    place.result.mkdir(parents=True)
    (place.own / ALIVE).touch()
    ended = threading.Event()
    threading.Thread(target=_stay_alive, args=[place, ended], daemon=True).start()
    try:
        yield place
    finally:
        ended.set()
        _take_away(place)


def _stay_alive(place: Workplace, ended: threading.Event) -> None:
    signs: dict[Path, float] = {}
    while True:
        with suppress(OSError):  # a storage that is away for a while: the next time will do
            signs = _look_around(place, signs)
        if ended.wait(ALIVE_SECONDS):
            return


def _look_around(place: Workplace, seen: dict[Path, float]) -> dict[Path, float]:
    """Write a heartbeat, and remove the staging directories of dead jobs.

    A job is dead if its last heartbeat is older than `DEAD_SECONDS` and has not changed since our last check. No job is
    treated as dead if our own last heartbeat is half of `DEAD_SECONDS` old or more: where a machine or a storage stood
    still, all jobs did.

    Args:
        place: the staging directories of this job.
        seen: time of the last heartbeat of each job at the last check, in seconds.

    Returns:
        The times of the last heartbeats at this check.
    """
    mine = place.own / ALIVE
    before = mine.stat().st_mtime
    os.utime(mine)
    now = mine.stat().st_mtime  # by the clock of the storage
    signs = {alive: alive.stat().st_mtime for alive in place.shared.glob(f"*/{ALIVE}")}
    for alive, sign in signs.items():
        if now - sign > DEAD_SECONDS and seen.get(alive) == sign and now - before < DEAD_SECONDS / 2:
            _take_away(Workplace(place.shared, alive.parent))
    return signs


def _take_away(place: Workplace) -> None:
    """Remove a job's staging directory, the largest folders first.

    If this process is killed midway, the heartbeat file is still there, so that another job recognises the rest as
    dead.
    """
    for folder in (place.result, place.quarantine, place.own):
        shutil.rmtree(folder, ignore_errors=True)


def publish(result: Path, folder: Path) -> None:
    """Publish a complete result under its name, unless another job was first."""
    try:
        result.rename(folder)
    except OSError as e:
        if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def clear(folder: Path) -> None:
    """Remove the staging directories beside a prepared folder, of jobs with any settings."""
    for left in folder.parent.glob(f"{glob.escape(folder.name)}.partial-*"):
        shutil.rmtree(left, ignore_errors=True)  # another job may do the same, or still be at it
