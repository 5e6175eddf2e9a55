"""Trackers, which pass the metrics of a run to a tool: their interface, and the queue of those that send requests."""

import logging
from threading import Event, Thread
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from mhmoe_ray.errors import StorageError
from mhmoe_ray.runs import history, metrics
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.storage import Location

LOG = logging.getLogger("mhmoe")
SEND_SECONDS = 5.0  # between two rounds in which queued metrics are sent
CLOSE_SECONDS = 10.0  # longest wait for unsent metrics at the end of training
ROWS_PER_REQUEST = 20  # MLflow takes 1,000 metrics, and a row has fewer than 50
EndStatus = Literal["FINISHED", "KILLED", "FAILED"]
"""Status of a run at the end of its training, in MLflow's words; KILLED means stopped before the last step."""


class Tracker(Protocol):
    """Tracker of one run, which passes its metrics to a tool such as TensorBoard, MLflow or Weights & Biases."""

    def report(self, line: dict[str, Any], loads_LE: np.ndarray | None) -> None:
        """Take the metrics of a step, as in a line of metrics.jsonl, and each expert's share of its layer's routes
        times E. The call must be fast: training waits."""

    def report_checkpoint(self, checkpoint: Location) -> None:
        """Take the folder of a new checkpoint."""

    def flush(self) -> None:
        """Write all reported metrics to files, if the tracker has files."""

    def close(self, end_status: EndStatus) -> None:
        """Write or send all remaining metrics, with the final status of the training."""


class Row(NamedTuple):
    """Metrics of a step for a tracking server."""

    line: dict[str, Any]
    loads_LE: np.ndarray | None
    """Expert loads; None for a dense model, and for a step of which only the line in metrics.jsonl is left."""

    @property
    def step(self) -> int:
        return int(self.line[metrics.STEP])


class TrackingError(Exception):
    """Reason in one line why a tracking server did not take a request, which may succeed later."""


class TrackingServer(Protocol):
    """A run's connection to a server. Calls may take any time, and a TrackingError means that they are repeated."""

    name: str

    def connect(self) -> int:
        """Open the run on the server, where an earlier worker group may have opened it. Return the last step there."""

    def send(self, rows: list[Row]) -> None:
        """Send the metrics of some steps, in order: all of them, or none if this raises a TrackingError."""

    def link_checkpoint(self, checkpoint: Location) -> None:
        """Show the folder of the newest checkpoint."""

    def end(self, end_status: EndStatus) -> None:
        """Send the final status of the training."""


class QueuedTracker:
    """Tracker that queues metrics, which a thread sends to a server, so that training never waits for the server.

    A server gets each step once. The thread asks the server for the last step that it has. Of the steps until then none
    is sent again, although a worker group repeats those since its checkpoint. Steps that earlier worker groups could
    not send come from metrics.jsonl.
    """

    def __init__(self, server: TrackingServer, run: RunDir, start_step: int) -> None:
        """Start the thread; the worker group continues from step `start_step`."""
        self._server, self._run, self._start_step = server, run, start_step
        # The training appends to this list, and the sending thread inserts and removes at its start; both are atomic.
        self._unsent: list[Row] = []
        self._last_step: int | None = None
        self._checkpoint: Location | None = None
        self._has_warned = False
        self._stop_event = Event()
        self._end_status: EndStatus = "FINISHED"
        self._thread = Thread(target=self._send_all, name=server.name, daemon=True)
        self._thread.start()

    def report(self, line: dict[str, Any], loads_LE: np.ndarray | None) -> None:
        """Queue the metrics of a step for the thread that sends them."""
        self._unsent.append(Row(line, loads_LE))

    def report_checkpoint(self, checkpoint: Location) -> None:
        """Keep the folder for the thread's next round."""
        self._checkpoint = checkpoint

    def flush(self) -> None:
        """Do nothing, because the thread sends metrics by itself."""

    def close(self, end_status: EndStatus) -> None:
        """Send the remaining metrics and the final status, within `CLOSE_SECONDS`; a warning counts unsent steps."""
        if unsent_count := self.finish(end_status, CLOSE_SECONDS):
            LOG.warning(
                "steps that %s did not accept: %d; `mhmoe track %s` sends them later",
                self._server.name, unsent_count, self._run.id,
            )  # fmt: skip

    def finish(self, end_status: EndStatus, seconds: float | None = None) -> int:
        """Send the remaining metrics and the final status, within `seconds` if given, and return the number of steps
        that were not sent."""
        self._end_status = end_status
        self._stop_event.set()
        self._thread.join(seconds)
        return len(self._unsent)

    def _send_all(self) -> None:
        """Send queued metrics every `SEND_SECONDS` until `close` is called, then once more with the final status."""
        while True:
            is_last_round = self._stop_event.wait(SEND_SECONDS)
            try:
                self._send()
                if is_last_round:
                    self._server.end(self._end_status)
            except (TrackingError, StorageError, OSError) as e:
                # Only the first failure is logged, because the thread tries again every few seconds and would fill the
                # log.
                if not self._has_warned:
                    self._has_warned = True
                    LOG.warning("%s: %s; trying again", self._server.name, e)
            if is_last_round:
                return

    def _send(self) -> None:
        if self._last_step is None:
            last_step = self._server.connect()
            if last_step < self._start_step:
                lines = history.read(self._run)
                self._unsent[:0] = [Row(line, None) for line in lines if line[metrics.STEP] <= self._start_step]
            self._last_step = last_step
        while self._unsent:
            rows = self._unsent[:ROWS_PER_REQUEST]
            self._server.send([row for row in rows if row.step > self._last_step])
            self._last_step = max(self._last_step, rows[-1].step)
            # Rows are deleted only after their request has succeeded, so that a failed request is repeated.
            del self._unsent[: len(rows)]
        if checkpoint := self._checkpoint:
            self._server.link_checkpoint(checkpoint)
            self._checkpoint = None
