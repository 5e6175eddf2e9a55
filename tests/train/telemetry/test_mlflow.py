"""Tests of the metrics of a run in MLflow, read with MLflow's own client."""

import logging
import socket

import pytest

from mhmoe_ray.errors import JobError
from mhmoe_ray.runs import metrics
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.storage import location
from mhmoe_ray.train.telemetry import tracker
from mhmoe_ray.train.telemetry.mlflow import MlflowServer
from mhmoe_ray.train.telemetry.tracker import QueuedTracker
from tests.support.specs import tiny_spec

# MLflow warns about runs in files, because it recommends a database.
pytestmark = pytest.mark.filterwarnings("ignore:.*filesystem.*:FutureWarning")


@pytest.fixture(autouse=True)
def short_intervals(monkeypatch):
    """Send metrics often, allow MLflow to store runs in files, and keep its client from retrying requests."""
    monkeypatch.setattr(tracker, "SEND_SECONDS", 0.05)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def open_tracker(run, server, start=0):
    spec = tiny_spec(tracking={"mlflow": server, "experiment": "tests", "group": "sweep"})
    return QueuedTracker(MlflowServer(run, spec), run, start)


def line(step, **fields):
    return {metrics.STEP: step, metrics.TIME: 1000.0 + step, metrics.LOSS: 8.0 / step, metrics.LR: 0.25, **fields}


def test_continued_run_continues_its_mlflow_run(tmp_path):
    from mlflow import MlflowClient

    run, server = RunDir(tmp_path / "tiny-abc123"), (tmp_path / "mlruns").as_uri()
    first_tracker = open_tracker(run, server)
    for step in (1, 2):
        first_tracker.report(line(step), None)
    assert first_tracker.finish("FAILED") == 0
    client = MlflowClient(tracking_uri=server)
    [mlflow_run] = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    assert mlflow_run.info.status == "FAILED"
    # The run goes on from a checkpoint at step 1, so it repeats step 2.
    second_tracker = open_tracker(run, server, start=1)
    second_tracker.report(line(2), None)
    second_tracker.report(line(3, **{metrics.VAL_LOSS: 2.5, metrics.GRAD_NORM: float("nan")}), None)
    second_tracker.report_checkpoint(location("s3://bucket/runs/tiny-abc123/checkpoints/step_00000003.2"))
    assert second_tracker.finish("FINISHED") == 0
    [mlflow_run] = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    assert mlflow_run.info.run_name == "tiny-abc123"
    assert mlflow_run.info.status == "FINISHED"
    assert mlflow_run.data.params["model.moe.heads"] == "2"
    tags = mlflow_run.data.tags
    assert tags["mhmoe_group"] == "sweep"
    assert tags["mhmoe_checkpoint"] == "s3://bucket/runs/tiny-abc123/checkpoints/step_00000003.2"
    assert "| speed/data_wait | percentunit |" in tags["mlflow.note.content"]
    loss = client.get_metric_history(mlflow_run.info.run_id, "loss/training")
    assert sorted((m.step, m.value) for m in loss) == [(1, 8.0), (2, 4.0), (3, 8.0 / 3)]
    assert mlflow_run.data.metrics["loss/validation"] == 2.5
    assert "optimizer/gradient_norm" not in mlflow_run.data.metrics


def test_unreachable_server_causes_a_warning_only(tmp_path, caplog):
    with socket.socket() as bound_socket:
        bound_socket.bind(("127.0.0.1", 0))  # nothing listens on the port
        server = f"http://127.0.0.1:{bound_socket.getsockname()[1]}"
        mlflow_tracker = open_tracker(RunDir(tmp_path / "tiny-abc123"), server)
        with caplog.at_level(logging.WARNING, "mhmoe"):
            mlflow_tracker.report(line(1), None)
            mlflow_tracker.close("FINISHED")
    warnings = [r.getMessage() for r in caplog.records if r.name == "mhmoe"]
    assert len(warnings) == 2, warnings
    assert "trying again" in warnings[0]
    assert f"steps that MLflow at {server} did not accept: 1;" in warnings[1]


def test_missing_mlflow_package_is_reported(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "mlflow", None)
    with pytest.raises(JobError, match=r"install mhmoe-ray\[mlflow\] where workers run"):
        open_tracker(RunDir(tmp_path), "http://127.0.0.1:1")


def test_invalid_server_address_is_reported(tmp_path):
    with pytest.raises(JobError, match=r"tracking\.mlflow htp://host:5000"):
        open_tracker(RunDir(tmp_path), "htp://host:5000")
