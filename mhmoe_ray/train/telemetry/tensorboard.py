"""Event files for TensorBoard below the run directory: `tensorboard --logdir RUN/tensorboard`.

An event file on an object store cannot grow: there the events between two flushes are a file of their own.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from mhmoe_ray.runs import metrics
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.runs.metrics import tagged
from mhmoe_ray.storage import copy_file

FLUSH_SECONDS = 10.0
"""Seconds after which written events can be read without a flush, except on an object store."""


class TensorBoard:
    def __init__(self, run: RunDir, group: int, start: int) -> None:
        """Open an event file and declare events of later steps than `start` void.

        Args:
            run: the run whose events are written.
            group: number of the worker group, after which files are named.
            start: step that the worker group continues from; events of later steps that were written before no longer
                count.
        """
        self._to, self._group, self._files = run.tensorboard, group, 0
        self._spool = None if isinstance(self._to, Path) else tempfile.TemporaryDirectory(prefix="mhmoe-")
        self._open()
        # From this step on, what was written before is void.
        self._writer.write_event(Event(session_log=SessionLog(status=SessionLog.START), step=start + 1))

    def tell(self, line: dict[str, Any]) -> None:
        scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in tagged(line).items()]
        step, when = line[metrics.STEP], line[metrics.TIME]
        self._writer.write_event(Event(summary=Summary(value=scalars), step=step, wall_time=when))
        if time.monotonic() - self._flushed > FLUSH_SECONDS and not self._spool:
            self.flush()

    def flush(self) -> None:
        """Return when all events that were written can be read."""
        if self._spool:
            self._hand_over()
            self._open()
        self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        if self._spool:
            self._hand_over()
            self._spool.cleanup()
        else:
            self._writer.close()

    def _open(self) -> None:
        folder = Path(self._spool.name) if self._spool else self._to
        assert isinstance(folder, Path)
        folder.mkdir(exist_ok=True)
        self._files += 1
        # Not tensorboardX's SummaryWriter, which hands events to itself through a pipe and flushes without those in it.
        self._writer = EventsWriter(str(folder / "events"), f".{self._group:04d}.{self._files:06d}")
        self._flushed = time.monotonic()

    def _hand_over(self) -> None:
        assert self._spool
        self._writer.close()
        for file in Path(self._spool.name).iterdir():
            copy_file(file, self._to / file.name)
            file.unlink()
