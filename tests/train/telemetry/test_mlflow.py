"""Tests of the metrics of a run in MLflow, read with MLflow's own client."""

import logging
import socket

import pytest

from mhmoe_ray.errors import JobError
from mhmoe_ray.runs import metrics
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.train.telemetry import mlflow as sink
from mhmoe_ray.train.telemetry.mlflow import MlflowRun
from tests.support.specs import tiny_spec

# MLflow warns about runs in files, because it recommends a database.
pytestmark = pytest.mark.filterwarnings("ignore:.*filesystem.*:FutureWarning")


@pytest.fixture(autouse=True)
def short_intervals(monkeypatch):
    """Send metrics often, allow MLflow to store runs in files, and keep its client from retrying requests."""
    monkeypatch.setattr(sink, "SEND_SECONDS", 0.05)
    monkeypatch.setattr(sink, "CLOSE_SECONDS", 10.0)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def spec(server):
    return tiny_spec(tracking={"mlflow": server, "experiment": "tests"})


def line(step, **fields):
    return {metrics.STEP: step, metrics.TIME: 1000.0 + step, metrics.LOSS: 8.0 / step, metrics.LR: 0.25, **fields}


def test_continued_run_continues_its_mlflow_run(tmp_path):
    from mlflow import MlflowClient

    run, server = RunDir(tmp_path / "tiny-abc123"), (tmp_path / "mlruns").as_uri()
    first_sink = MlflowRun(run, spec(server))
    for step in (1, 2):
        first_sink.report(line(step))
    first_sink.close("FAILED")
    client = MlflowClient(tracking_uri=server)
    [mlflow_run] = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    assert mlflow_run.info.status == "FAILED"
    second_sink = MlflowRun(run, spec(server))
    second_sink.report(line(3, **{metrics.VAL_LOSS: 2.5, metrics.GRAD_NORM: float("nan")}))
    second_sink.close("FINISHED")
    [mlflow_run] = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    assert mlflow_run.info.run_name == "tiny-abc123"
    assert mlflow_run.info.status == "FINISHED"
    assert mlflow_run.data.params["model.moe.heads"] == "2"
    loss = client.get_metric_history(mlflow_run.info.run_id, "loss/training")
    assert sorted((m.step, m.value) for m in loss) == [(1, 8.0), (2, 4.0), (3, 8.0 / 3)]
    assert mlflow_run.data.metrics["loss/validation"] == 2.5
    assert "optimizer/gradient_norm" not in mlflow_run.data.metrics


def test_unreachable_server_causes_a_warning_only(tmp_path, caplog):
    with socket.socket() as bound_socket:
        bound_socket.bind(("127.0.0.1", 0))  # nothing listens on the port
        run = MlflowRun(RunDir(tmp_path / "tiny-abc123"), spec(f"http://127.0.0.1:{bound_socket.getsockname()[1]}"))
        with caplog.at_level(logging.WARNING, "mhmoe"):
            run.report(line(1))
            run.close("FINISHED")
    warnings = [r.getMessage() for r in caplog.records if r.name == "mhmoe"]
    assert len(warnings) == 2, warnings
    assert "trying again" in warnings[0]
    assert "2 metrics were not accepted by MLflow" in warnings[1]


def test_missing_mlflow_package_is_reported(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "mlflow", None)
    with pytest.raises(JobError, match=r"install mhmoe-ray\[mlflow\] where workers run"):
        MlflowRun(RunDir(tmp_path), spec("http://127.0.0.1:1"))


def test_invalid_server_address_is_reported(tmp_path):
    with pytest.raises(JobError, match=r"tracking\.mlflow htp://host:5000"):
        MlflowRun(RunDir(tmp_path), spec("htp://host:5000"))
