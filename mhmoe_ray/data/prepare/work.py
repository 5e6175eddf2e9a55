"""The folders that a preparation works in until it is whole, and giving the result its name.

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
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from mhmoe_ray.data.shards.manifest import recipe
from mhmoe_ray.spec import RunSpec

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


def make_workplace(spec: RunSpec) -> Workplace:
    """A new job's, of which it says from time to time that it is still at work. As long as it does, it takes away what
    other jobs have left that do not say so any more: all that they had packed."""
    place = Workplace(shared := shared_folder(spec), shared / secrets.token_hex(4))
    place.result.mkdir(parents=True)
    (place.own / ALIVE).touch()
    threading.Thread(target=_stay_alive, args=[place], daemon=True).start()
    return place


def _stay_alive(place: Workplace) -> None:
    there = True
    while there:
        with suppress(OSError):  # a storage that is away for a while: the next time will do
            there = place.own.exists()  # else the job has ended
            os.utime(place.own / ALIVE)
            _bury_the_dead(place)
        time.sleep(ALIVE_SECONDS)


def _bury_the_dead(place: Workplace) -> None:
    now = (place.own / ALIVE).stat().st_mtime  # by the clock of the storage
    for other in place.shared.glob(f"*/{ALIVE}"):
        if now - other.stat().st_mtime > DEAD_SECONDS:
            shutil.rmtree(other.parent, ignore_errors=True)


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
