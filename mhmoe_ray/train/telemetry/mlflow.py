"""Metrics of a run in MLflow, if the spec names a server (`tracking.mlflow`).

A thread of its own makes all requests, so training never waits for the server. Metrics that the server does not accept
are sent again later; if it never accepts them, the log gets a warning, and metrics.jsonl has them in any case. A
resumed run continues its MLflow run, which has the run's id in the tag `mhmoe_run`.
"""

import logging
import os
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from mhmoe_ray.errors import JobError
from mhmoe_ray.runs import metrics
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.runs.metrics import tagged_values
from mhmoe_ray.spec import RunSpec, dotted_items
from mhmoe_ray.train.telemetry.tracker import EndStatus

if TYPE_CHECKING:
    from mlflow.entities import Metric


LOG = logging.getLogger("mhmoe")
SEND_SECONDS = 5.0  # between two rounds in which queued metrics are sent
CLOSE_SECONDS = 10.0  # longest wait for unsent metrics at the end of training
MAX_METRICS_PER_REQUEST = 1000  # MLflow's limit
MAX_VALUE_CHARACTERS = 6000  # MLflow's limit for the value of a parameter
TAG = "mhmoe_run"


class MlflowRun:
    """Tracker that sends the metrics of a run to an MLflow server."""

    def __init__(self, run: RunDir, spec: RunSpec) -> None:
        """Start the thread that sends metrics; without MLflow, or with an address that it refuses, raise a JobError."""
        assert spec.tracking.mlflow is not None
        self._run, self._spec, self._server = run, spec, spec.tracking.mlflow
        self._client = _client(self._server)
        self._run_id: str | None = None
        # The training appends to this list, and the sending thread removes from its start; both are atomic.
        self._unsent: list[Metric] = []
        self._has_warned = False
        self._stop_event = Event()
        self._end_status = "FINISHED"
        self._thread = Thread(target=self._send_all, name="mlflow", daemon=True)
        self._thread.start()

    def report(self, line: dict[str, Any]) -> None:
        """Queue the metrics of a step for the thread that sends them."""
        from mlflow.entities import Metric

        # MLflow has timestamps in milliseconds.
        time_ms, step = int(line[metrics.TIME] * 1000), line[metrics.STEP]
        new_metrics = [Metric(tag, value, time_ms, step) for tag, value in tagged_values(line).items()]
        self._unsent.extend(new_metrics)

    def flush(self) -> None:
        """Do nothing, because the thread sends metrics by itself."""

    def close(self, end_status: EndStatus) -> None:
        """Send the remaining metrics and the final status, within `CLOSE_SECONDS`; a warning counts unsent metrics."""
        self._end_status = end_status
        self._stop_event.set()
        self._thread.join(CLOSE_SECONDS)
        if unsent_count := len(self._unsent):
            LOG.warning(
                "%d metrics were not accepted by MLflow at %s; metrics.jsonl has them", unsent_count, self._server
            )

    def _send_all(self) -> None:
        """Send queued metrics every `SEND_SECONDS` until `close` is called, then once more with the final status."""
        from mlflow.exceptions import MlflowException

        while True:
            is_last_round = self._stop_event.wait(SEND_SECONDS)
            try:
                self._send()
                if is_last_round:
                    self._client.set_terminated(self._run_id, status=self._end_status)
                    return
            except MlflowException as e:
                # Only the first failure is logged, because the thread tries again every few seconds and would fill the
                # log.
                if not self._has_warned:
                    self._has_warned = True
                    LOG.warning("MLflow at %s: %s; trying again", self._server, str(e).splitlines()[0])
                if is_last_round:
                    return

    def _send(self) -> None:
        if self._run_id is None:
            self._run_id = self._find_run() or self._create_run()
        while self._unsent:
            batch = self._unsent[:MAX_METRICS_PER_REQUEST]
            self._client.log_batch(self._run_id, metrics=batch)
            # Metrics are deleted only after their request has succeeded, so that a failed request is repeated.
            del self._unsent[: len(batch)]

    def _experiment_id(self) -> str:
        name = self._spec.tracking.experiment
        experiment = self._client.get_experiment_by_name(name)
        return str(experiment.experiment_id if experiment else self._client.create_experiment(name))

    def _find_run(self) -> str | None:
        """Return the id of the MLflow run of an earlier worker group, set to running; None if there is no such run."""
        mlflow_runs = self._client.search_runs([self._experiment_id()], f"tags.{TAG} = '{self._run.id}'", max_results=1)
        if not mlflow_runs:
            return None
        run_id = str(mlflow_runs[0].info.run_id)
        self._client.update_run(run_id, status="RUNNING")
        # An earlier worker group may have ended between the two requests of `_create_run`. Its MLflow run then has no
        # parameters yet.
        if not mlflow_runs[0].data.params:
            self._log_params(run_id)
        return run_id

    def _create_run(self) -> str:
        mlflow_run = self._client.create_run(self._experiment_id(), run_name=self._run.id, tags={TAG: self._run.id})
        run_id = str(mlflow_run.info.run_id)
        self._log_params(run_id)
        return run_id

    def _log_params(self, run_id: str) -> None:
        from mlflow.entities import Param

        tree = self._spec.model_dump(mode="json", include={"seed", "origin", "model", "train"})
        params = [Param(name, str(value)[:MAX_VALUE_CHARACTERS]) for name, value in dotted_items(tree)]
        self._client.log_batch(run_id, params=params)


def _client(server: str) -> Any:
    # Without this setting MLflow sends data about its use to its makers.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # The client need not retry a request, because the sending thread itself repeats it in its next round.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
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


def open_tracker(run: RunDir, spec: RunSpec, group: int, start: int) -> MlflowRun | None:
    """Return the MLflow tracker of a run, or None without a server; `group` and `start` belong to
    `sinks.OpenTracker`."""
    return MlflowRun(run, spec) if spec.tracking.mlflow else None
