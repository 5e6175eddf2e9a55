"""Event files for TensorBoard below the run directory: `tensorboard --logdir RUN/tensorboard`. An event file on an
object store cannot grow, so each flush there writes a new file, with the events since the last flush."""

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from mhmoe_ray.runs import metrics
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.runs.metrics import tagged_values
from mhmoe_ray.storage import Location, copy_file
from mhmoe_ray.train.telemetry.tracker import EndStatus

FLUSH_SECONDS = 10.0
"""Seconds after which events are flushed to their file. On an object store, only `flush` writes them."""


class TensorBoard:
    """Tracker that writes event files for TensorBoard."""

    def __init__(self, run: RunDir, group: int, start: int) -> None:
        """Open an event file, and void earlier events of steps after `start`, which this worker group repeats."""
        self._folder, self._group, self._file_count = run.tensorboard, group, 0
        self._spool = None if isinstance(self._folder, Path) else tempfile.TemporaryDirectory(prefix="mhmoe-")
        self._open()
        # At this START event, TensorBoard drops the events after step `start` that were written before this one.
        # They are from an earlier worker group, and this group repeats these steps.
        self._writer.write_event(Event(session_log=SessionLog(status=SessionLog.START), step=start + 1))

    def report(self, line: dict[str, Any], loads_LE: np.ndarray | None) -> None:
        """Write the metrics of a step as one event, without the expert loads."""
        scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in tagged_values(line).items()]
        step, wall_time = line[metrics.STEP], line[metrics.TIME]
        self._writer.write_event(Event(summary=Summary(value=scalars), step=step, wall_time=wall_time))
        if time.monotonic() - self._flushed > FLUSH_SECONDS and not self._spool:
            self.flush()

    def report_checkpoint(self, checkpoint: Location) -> None:
        """Do nothing, because event files have no place for it."""

    def flush(self) -> None:
        """Write all events, so that TensorBoard can read them."""
        if self._spool:
            self._upload()
            self._open()
        self._writer.flush()
        self._flushed = time.monotonic()

    def close(self, end_status: EndStatus) -> None:
        """Write all events and close the file. `end_status` is unused, because TensorBoard shows no status."""
        if self._spool:
            self._upload()
            self._spool.cleanup()
        else:
            self._writer.close()

    def _open(self) -> None:
        folder = Path(self._spool.name) if self._spool else self._folder
        assert isinstance(folder, Path)
        folder.mkdir(exist_ok=True)
        self._file_count += 1
        # tensorboardX's SummaryWriter is not used: it sends events to itself through a pipe, and its flush does not
        # write the events that are still in the pipe.
        self._writer = EventsWriter(str(folder / "events"), f".{self._group:04d}.{self._file_count:06d}")
        self._flushed = time.monotonic()

    def _upload(self) -> None:
        assert self._spool
        self._writer.close()
        for file in Path(self._spool.name).iterdir():
            copy_file(file, self._folder / file.name)
            file.unlink()
