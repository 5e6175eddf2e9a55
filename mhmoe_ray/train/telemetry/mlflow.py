"""Metrics of a run in MLflow, if the spec names a server (`tracking.mlflow`).

A resumed run continues its MLflow run, which has the run's id in the tag `mhmoe_run`.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mhmoe_ray.errors import JobError
from mhmoe_ray.runs import metrics
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.runs.metrics import describe_tags, tagged_values
from mhmoe_ray.spec import RunSpec, dotted_items
from mhmoe_ray.storage import Location
from mhmoe_ray.train.telemetry.tracker import EndStatus, Row, TrackingError

MAX_VALUE_CHARACTERS = 6000  # MLflow's limit for the value of a parameter
TAG = "mhmoe_run"
STEP_METRIC = "step"
"""Metric of the number of steps, whose newest value is the last step that the server has."""


class MlflowServer:
    """Connection of a run to an MLflow server."""

    def __init__(self, run: RunDir, spec: RunSpec) -> None:
        """Make the client; without MLflow, or with an address that it refuses, raise a JobError."""
        self._run, self._spec, self._run_id = run, spec, ""
        self.name = f"MLflow at {spec.tracking.mlflow}"
        self._client = _client(spec)

    def connect(self) -> int:
        """Find or create the run's MLflow run, and set it to running."""
        with _one_line_errors():
            name = self._spec.tracking.experiment
            experiment = self._client.get_experiment_by_name(name)
            experiment_id = str(experiment.experiment_id if experiment else self._client.create_experiment(name))
            found_runs = self._client.search_runs([experiment_id], f"tags.{TAG} = '{self._run.id}'", max_results=1)
            tags = {TAG: self._run.id, "mlflow.note.content": describe_tags()}
            if group := self._spec.tracking.group:
                tags["mhmoe_group"] = group
            mlflow_run = (
                found_runs[0]
                if found_runs
                else self._client.create_run(experiment_id, run_name=self._run.id, tags=tags)
            )
            self._run_id = str(mlflow_run.info.run_id)
            self._client.update_run(self._run_id, status="RUNNING")
            # An earlier worker group may have ended between two requests of this method.
            if not mlflow_run.data.params:
                self._log_params()
            return int(mlflow_run.data.metrics.get(STEP_METRIC, 0))

    def send(self, rows: list[Row]) -> None:
        """Send the metrics in one request, and with them the last step that they belong to."""
        from mlflow.entities import Metric

        # MLflow has timestamps in milliseconds.
        new_metrics = [
            Metric(tag, value, int(line[metrics.TIME] * 1000), line[metrics.STEP])
            for line, _ in rows
            for tag, value in (tagged_values(line) | {STEP_METRIC: line[metrics.STEP]}).items()
        ]
        with _one_line_errors():
            self._client.log_batch(self._run_id, metrics=new_metrics)

    def link_checkpoint(self, checkpoint: Location) -> None:
        """Set the tag `mhmoe_checkpoint`."""
        with _one_line_errors():
            self._client.set_tag(self._run_id, "mhmoe_checkpoint", str(checkpoint))

    def end(self, end_status: EndStatus) -> None:
        """Set the status of the MLflow run."""
        with _one_line_errors():
            self._client.set_terminated(self._run_id, status=end_status)

    def _log_params(self) -> None:
        from mlflow.entities import Param

        tree = self._spec.model_dump(mode="json", include={"seed", "origin", "model", "train"})
        params = [Param(name, str(value)[:MAX_VALUE_CHARACTERS]) for name, value in dotted_items(tree)]
        self._client.log_batch(self._run_id, params=params)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as e:
        raise TrackingError(str(e).splitlines()[0]) from e


def open_server(run: RunDir, spec: RunSpec) -> MlflowServer | None:
    """Return a run's connection to MLflow; None without a server in the spec."""
    return MlflowServer(run, spec) if spec.tracking.mlflow else None


def _client(spec: RunSpec) -> Any:
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
        return MlflowClient(tracking_uri=spec.tracking.mlflow)
    except MlflowException as e:
        fix = "give a server, http://host:5000"
        raise JobError(f"tracking.mlflow {spec.tracking.mlflow}", str(e).splitlines()[0], fix) from e
