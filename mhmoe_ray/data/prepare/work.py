"""The staging directories of a preparation, its progress, and publishing the result under its name.

    <prepared>.partial-<hash of the settings>/
      parts/           tokens of chunks, named by content: what an earlier job left, this one does not make again
      progress.json
      <a job's own>/   quarantine of each file; prepared/, the result; alive, written while the job is

Jobs may work here at once: parts are all they share, each is written in one step, and two of one name are the same. The
first to have a whole result gives it the name and takes the rest away; the others find that and use it.
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
    """Of tokenising bytes as they are stored, of packing shards."""
    total: int
    documents: int
    tokens: int
    found_tokens: int
    """Of these, tokens that an earlier attempt left."""
    bytes_per_s: float
    """Stored bytes tokenised by this attempt."""
    seconds_left: float | None
    """Of tokenising; None before it can be told."""


@dataclass
class Report:
    """Keeps the file up to date."""

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
    """None where nothing is being prepared."""
    try:
        return PreparationProgress.model_validate_json((folder / FILE).read_bytes())
    except (OSError, ValidationError):
        return None


ALIVE = "alive"
ALIVE_SECONDS = 20.0
"""Between two signs of life."""
DEAD_SECONDS = 1200.0
"""Without one."""


class Workplace(NamedTuple):
    shared: Path
    """Of all jobs with these settings."""
    own: Path
    """Of this job."""

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
    """A new job's, of which it says from time to time that it is still at work, and which is taken away in the end. As
    long as it is, it takes away what other jobs have left that do not say so any more: all that they had packed."""
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
    """Give a sign of life, and take away what others left that have given none for long, nor since we looked before;
    unless we have been as silent: where a machine or a storage stood still, so have all.

    Args:
        place: ours.
        seen: the last sign of each job, in seconds, when we looked before.

    Returns:
        The same now.
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
    """What is large first, so that what is left by one who is killed meanwhile can be told to be dead, too."""
    for folder in (place.result, place.quarantine, place.own):
        shutil.rmtree(folder, ignore_errors=True)


def publish(result: Path, folder: Path) -> None:
    """Give a whole result its name, unless another job was first."""
    try:
        result.rename(folder)
    except OSError as e:
        if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def clear(folder: Path) -> None:
    """Take away what jobs have left beside a prepared folder, with whatever settings."""
    for left in folder.parent.glob(f"{glob.escape(folder.name)}.partial-*"):
        shutil.rmtree(left, ignore_errors=True)  # another job may do the same, or still be at it
