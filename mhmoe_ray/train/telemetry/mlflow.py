"""Metrics of a run in MLflow, where the spec names a server (`tracking.mlflow`).

A thread of its own makes all requests, so training never waits for the server. Metrics that the server does not accept
now are sent again later. If it never accepts them, the log has a warning, and metrics.jsonl has them in any case. A run
that is continued is continued in MLflow too: the MLflow run is found by the run's id, in the tag `mhmoe_run`.
"""

import logging
import os
from collections.abc import Iterator
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, Literal

from mhmoe_ray.errors import JobError
from mhmoe_ray.runs import metrics
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.runs.metrics import tagged
from mhmoe_ray.spec import RunSpec, leaves

if TYPE_CHECKING:
    from mlflow.entities import Metric


LOG = logging.getLogger("mhmoe")
SEND_SECONDS = 5.0
CLOSE_SECONDS = 10.0
"""Seconds that the end of training waits for metrics that are not sent yet."""
MOST_METRICS = 1000
"""Largest number of metrics that MLflow accepts in one request."""
LONGEST_VALUE = 6000
"""Largest number of characters of a parameter's value in MLflow."""
TAG = "mhmoe_run"
End = Literal["FINISHED", "KILLED", "FAILED"]


class MlflowRun:
    def __init__(self, run: RunDir, spec: RunSpec) -> None:
        """Start the thread that sends metrics.

        Args:
            run: the run whose metrics are sent.
            spec: spec of the run, which names an MLflow server.

        Raises:
            JobError: MLflow is not installed, or does not accept the server's address.
        """
        assert spec.tracking.mlflow is not None
        self._run, self._spec, self._server = run, spec, spec.tracking.mlflow
        self._client = _client(self._server)
        self._id: str | None = None
        self._queue: SimpleQueue[Metric] = SimpleQueue()
        self._unsent: list[Metric] = []
        self._warned = False
        self._over = Event()
        self._end = "FINISHED"
        self._thread = Thread(target=self._send_all, name="mlflow", daemon=True)
        self._thread.start()

    def tell(self, line: dict[str, Any]) -> None:
        from mlflow.entities import Metric

        when, step = int(line[metrics.TIME] * 1000), line[metrics.STEP]
        for tag, value in tagged(line).items():
            self._queue.put(Metric(tag, value, when, step))

    def close(self, end: End) -> None:
        """Send the remaining metrics and the run's final status, for at most `CLOSE_SECONDS`.

        If the server has not accepted some of the metrics by then, a warning in the log says how many.

        Args:
            end: how the training ended, as an MLflow status.
        """
        self._end = end
        self._over.set()
        self._thread.join(CLOSE_SECONDS)
        left = len(self._unsent) + self._queue.qsize()
        if left:
            LOG.warning("%d numbers never reached MLflow at %s; metrics.jsonl has them", left, self._server)

    def _send_all(self) -> None:
        from mlflow.exceptions import MlflowException

        while True:
            last = self._over.wait(SEND_SECONDS)
            try:
                self._send()
                if last:
                    self._client.set_terminated(self._id, status=self._end)
                    return
            except MlflowException as e:
                if not self._warned:
                    self._warned = True
                    LOG.warning("MLflow at %s: %s; trying again", self._server, str(e).splitlines()[0])
                if last:
                    return

    def _send(self) -> None:
        if self._id is None:
            self._id = self._find() or self._create()
        self._unsent += _drained(self._queue)
        while self._unsent:
            self._client.log_batch(self._id, metrics=self._unsent[:MOST_METRICS])
            del self._unsent[:MOST_METRICS]

    def _experiment(self) -> str:
        name = self._spec.tracking.experiment
        found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id if found else self._client.create_experiment(name))

    def _find(self) -> str | None:
        """Find the MLflow run that an earlier worker group created, and set it to running again.

        Returns:
            The id of the MLflow run; None if there is none.
        """
        found = self._client.search_runs([self._experiment()], f"tags.{TAG} = '{self._run.id}'", max_results=1)
        if not found:
            return None
        run_id = str(found[0].info.run_id)
        self._client.update_run(run_id, status="RUNNING")
        if not found[0].data.params:
            self._describe(run_id)
        return run_id

    def _create(self) -> str:
        made = self._client.create_run(self._experiment(), run_name=self._run.id, tags={TAG: self._run.id})
        run_id = str(made.info.run_id)
        self._describe(run_id)
        return run_id

    def _describe(self, run_id: str) -> None:
        from mlflow.entities import Param

        tree = self._spec.model_dump(mode="json", include={"seed", "origin", "model", "train"})
        params = [Param(key, str(value)[:LONGEST_VALUE]) for key, value in leaves(tree)]
        self._client.log_batch(run_id, params=params)


def _client(server: str) -> Any:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # nobody asked for reports to its makers
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # we try again ourselves
    try:
        from mlflow import MlflowClient
    except ImportError as e:
        fix = "install mhmoe-ray[mlflow] where workers run, or remove the key"
        raise JobError("tracking.mlflow", "MLflow is not installed there", fix) from e
    from mlflow.exceptions import MlflowException

    try:
        return MlflowClient(tracking_uri=server)
    except MlflowException as e:
        fix = "give a server, http://host:5000"
        raise JobError(f"tracking.mlflow {server}", str(e).splitlines()[0], fix) from e


def _drained(queue: "SimpleQueue[Metric]") -> "Iterator[Metric]":
    while True:
        try:
            yield queue.get_nowait()
        except Empty:
            return
