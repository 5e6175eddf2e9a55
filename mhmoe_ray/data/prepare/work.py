"""The staging directory of a preparation, its progress report, and the publishing of the result under its name.

    <prepared>.partial-<hash of the settings>/
      parts/           tokens of chunks, named by content: a job reuses the parts of earlier jobs
      progress.json
      <job>/           quarantine/; prepared/, the result; alive, a file whose modification time is the job's heartbeat

Several jobs may use a staging directory at once: they share only the parts. Each part is written in one step, and two
parts of the same name have the same content. The first job with a complete result publishes it and cleans up; the
others use the published folder.
"""

import errno
import glob
import hashlib
import json
import secrets
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pydantic import BaseModel, ValidationError

from mhmoe_ray.data.shards.manifest import MANIFEST_FILE, PUBLISHING_PREFIX
from mhmoe_ray.data.shards.recipe import recipe
from mhmoe_ray.errors import DataError
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.storage import (
    Location,
    ObjectPath,
    make_folder,
    remove_partial_files,
    remove_tree,
    replace_file,
    report_write_errors,
    sync,
)

PROGRESS_FILE = "progress.json"
WRITE_SECONDS = 1.0

Stage = Literal["tokenizer", "tokenising", "reading", "packing", "finishing"]
"""Stages of a preparation; `reading` has no text to tokenise, as for vision models."""


class PreparationProgress(BaseModel):
    """Content of progress.json."""

    stage: Stage
    done: int
    """Bytes of raw files read; shards written in the stage `packing`."""
    total: int
    """Bytes of all raw files; all shards in the stage `packing`."""
    documents: int
    tokens: int
    found_tokens: int
    """Those of `tokens` that were found in parts of an earlier job."""


@dataclass
class ProgressReport:
    """Counts that a job keeps up to date and writes to progress.json."""

    folder: Location
    """Staging directory that jobs share."""
    total_bytes: int
    stage: Stage = "tokenizer"
    done_bytes: int = 0
    documents: int = 0
    tokens: int = 0
    reused_tokens: int = 0
    shards: int = 0
    total_shards: int = 0
    _write_time: float = 0.0

    def enter_stage(self, stage: Stage) -> None:
        """Begin a stage and write progress.json."""
        self.stage = stage
        self.write()

    def refresh(self) -> None:
        """Write progress.json at most every `WRITE_SECONDS`."""
        if time.monotonic() - self._write_time >= WRITE_SECONDS:
            self.write()

    def write(self) -> None:
        """Write progress.json with the counts."""
        self._write_time = time.monotonic()
        is_packing = self.stage == "packing"
        progress = PreparationProgress(
            stage=self.stage,
            done=self.shards if is_packing else self.done_bytes,
            total=self.total_shards if is_packing else self.total_bytes,
            documents=self.documents,
            tokens=self.tokens,
            found_tokens=self.reused_tokens,
        )
        replace_file(self.folder / PROGRESS_FILE, progress.model_dump_json().encode())


def read_progress(folder: Location) -> PreparationProgress | None:
    """Return a staging directory's last progress, if it has a readable report; a killed job's report stays."""
    try:
        return PreparationProgress.model_validate_json((folder / PROGRESS_FILE).read_bytes())
    except (OSError, ValidationError):
        return None


ALIVE_FILE = "alive"
TOUCH_SECONDS = 20.0
"""Seconds between two updates of the modification time of a job's file `alive`."""
ANNOUNCEMENT_SECONDS = 2.0
"""Longest time in seconds between an announcement of a job on an object store and its visibility to others."""
COPIERS = 16
"""Number of objects that a job copies at the same time."""
STALE_SECONDS = 1200.0
"""Age of that modification time in seconds above which the job counts as dead."""


class StagingDirectory(NamedTuple):
    """Paths of the staging directory of a preparation job."""

    shared_path: Location
    """Staging directory of all jobs with the same settings."""
    job_path: Location
    """Staging directory of this job alone, in the shared one."""

    @property
    def parts_path(self) -> Location:
        """Folder of the parts, which jobs share."""
        return self.shared_path / "parts"

    @property
    def quarantine_path(self) -> Location:
        """Folder of a quarantine file for each chunk with unreadable lines."""
        return self.job_path / "quarantine"

    @property
    def result_path(self) -> Location:
        """Folder of the result, which becomes the prepared folder."""
        return self.job_path / "prepared"


def shared_folder(spec: RunSpec) -> Location:
    """Return the staging directory that all jobs with a spec's settings share."""
    digest = hashlib.sha256(json.dumps(recipe(spec), sort_keys=True).encode()).hexdigest()
    return spec.data.prepared.with_name(f"{spec.data.prepared.name}.partial-{digest[:8]}")


@contextmanager
def staging_directory(spec: RunSpec) -> Iterator[StagingDirectory]:
    """Create the staging directory of a new job and remove it, without shared parts, at the end of the context.

    Meanwhile a thread updates the job's file `alive` and removes the staging directories of dead jobs.
    """
    staging = StagingDirectory(shared_path := shared_folder(spec), shared_path / secrets.token_hex(4))
    make_folder(staging.result_path)
    (staging.job_path / ALIVE_FILE).touch()
    stop_event = threading.Event()
    threading.Thread(target=_keep_alive, args=[staging, stop_event], daemon=True).start()
    try:
        yield staging
    finally:
        stop_event.set()
        _remove_job_folder(staging)


def _keep_alive(staging: StagingDirectory, stop_event: threading.Event) -> None:
    touch_times: dict[Location, float] = {}
    while True:
        # An error is ignored, because the storage may be out of reach for a while, and a later update then suffices.
        with suppress(OSError):
            touch_times = _touch_and_clean_up(staging, touch_times)
        if stop_event.wait(TOUCH_SECONDS):
            return


def _touch_and_clean_up(staging: StagingDirectory, previous_times: dict[Location, float]) -> dict[Location, float]:
    """Update our file `alive`, and remove the staging directories of dead jobs; return all modification times.

    A job is dead if its modification time is older than `STALE_SECONDS` and equals that in `previous_times`. If this
    job itself stood still since then, the others may have, too, so none is treated as dead.
    """
    our_file = staging.job_path / ALIVE_FILE
    previous_time = our_file.stat().st_mtime
    our_file.touch()
    # All times come from the clock of the storage, because the clocks of machines differ.
    current_time = our_file.stat().st_mtime
    touch_times = {alive_file: alive_file.stat().st_mtime for alive_file in staging.shared_path.glob(f"*/{ALIVE_FILE}")}
    # If our own previous time is old too, the machine or the storage stood still. The other jobs may then be alive, so
    # none is removed.
    for alive_file, touch_time in touch_times.items():
        if (
            current_time - touch_time > STALE_SECONDS
            and previous_times.get(alive_file) == touch_time
            and current_time - previous_time < STALE_SECONDS / 2
        ):
            _remove_job_folder(StagingDirectory(staging.shared_path, alive_file.parent))
    return touch_times


def _remove_job_folder(staging: StagingDirectory) -> None:
    # The folder with the file `alive` is removed last. If this process is killed midway, the file is still there, so
    # another job recognises that this job is dead and removes the rest.
    for folder in (staging.result_path, staging.quarantine_path, staging.job_path):
        remove_tree(folder, ignore_errors=True)


def publish(staging: StagingDirectory, folder: Location) -> None:
    """Give a complete result the name of the prepared folder, unless that has content.

    If a job with other settings publishes there at the same time, one of the two raises a DataError.
    """
    result = staging.result_path
    if isinstance(result, ObjectPath) or isinstance(folder, ObjectPath):
        assert isinstance(result, ObjectPath)
        assert isinstance(folder, ObjectPath)
        _publish_objects(staging, result, folder)
        return
    # Killed workers may have left partial files.
    remove_partial_files(result)
    try:
        result.rename(folder)
    except OSError as e:
        # These two errors mean that a folder with content has this name already: another job published its result
        # first.
        if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def _publish_objects(staging: StagingDirectory, result: ObjectPath, folder: ObjectPath) -> None:
    """Copy a result within its store, the manifest last, unless another job's manifest is there already."""
    # Jobs with equal settings copy equal objects, so they need no order among themselves. Of jobs with other settings,
    # the one that announced itself first goes on. Each waits before it looks, so that it sees all earlier ones.
    prefix = f"{PUBLISHING_PREFIX}{staging.shared_path.name.rpartition('-')[2]}-"
    announcement = folder / f"{prefix}{staging.job_path.name}"
    announcement.touch()
    time.sleep(ANNOUNCEMENT_SECONDS)
    announcements = []
    for path in folder.glob(f"{PUBLISHING_PREFIX}*"):
        with suppress(FileNotFoundError):
            announcements.append((path.stat().st_mtime, path.name))
    # The announcements are read before this check: they are removed only after a manifest is there.
    if not (folder / MANIFEST_FILE).exists():
        if not min(announcements)[1].startswith(prefix):
            announcement.unlink(missing_ok=True)
            reason = "a job with other settings publishes its result there, or was killed while it did"
            fix = "set data.prepared to another folder, or remove this one"
            raise DataError(f"prepared data {folder}", reason, fix)
        copied_files = [file for file in sorted(result.tree_sizes()) if file != MANIFEST_FILE]
        with ThreadPoolExecutor(COPIERS) as threads:
            for _ in threads.map(lambda file: (result / file).copy_to(folder / file), copied_files):
                pass
        (result / MANIFEST_FILE).copy_to(folder / MANIFEST_FILE)
    # Killed jobs may have left announcements. With the manifest, no job needs one.
    for announcement in folder.glob(f"{PUBLISHING_PREFIX}*"):
        announcement.unlink(missing_ok=True)


def clean_up(folder: Location) -> None:
    """Remove the staging directories of all jobs for a prepared folder, whatever their settings."""
    # The result keeps its name after a crash of the machine, which would otherwise lose it with the staging directory.
    with report_write_errors(folder):
        sync(folder.parent)
    for staging_path in folder.parent.glob(f"{glob.escape(folder.name)}.partial-*"):
        # Errors are ignored, because another job may remove the same folder or still write to it.
        remove_tree(staging_path, ignore_errors=True)
