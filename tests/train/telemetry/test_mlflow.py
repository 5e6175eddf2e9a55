"""The record of a run in MLflow, as MLflow's own client reads it."""

import logging
import socket

import pytest

from mhmoe_ray.errors import JobError
from mhmoe_ray.runs import metrics
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.train.telemetry import mlflow as sink
from mhmoe_ray.train.telemetry.mlflow import MlflowRun
from tests.specs import tiny_spec

pytestmark = pytest.mark.filterwarnings("ignore:.*filesystem.*:FutureWarning")  # MLflow would rather have a database


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(sink, "SEND_SECONDS", 0.05)
    monkeypatch.setattr(sink, "CLOSE_SECONDS", 10.0)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def spec(server):
    return tiny_spec(tracking={"mlflow": server, "experiment": "tests"})


def line(step, **more):
    return {metrics.STEP: step, metrics.TIME: 1000.0 + step, metrics.LOSS: 8.0 / step, metrics.LR: 0.25, **more}


def test_a_run_that_goes_on_goes_on_in_the_same_mlflow_run(tmp_path):
    from mlflow import MlflowClient

    run, server = RunDir(tmp_path / "tiny-abc123"), (tmp_path / "mlruns").as_uri()
    first = MlflowRun(run, spec(server))
    for step in (1, 2):
        first.tell(line(step))
    first.close("FAILED")
    client = MlflowClient(tracking_uri=server)
    [found] = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    assert found.info.status == "FAILED"
    second = MlflowRun(run, spec(server))
    second.tell(line(3, **{metrics.VAL_LOSS: 2.5, metrics.GRAD_NORM: float("nan")}))
    second.close("FINISHED")
    [found] = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    assert found.info.run_name == "tiny-abc123"
    assert found.info.status == "FINISHED"
    assert found.data.params["model.moe.heads"] == "2"
    loss = client.get_metric_history(found.info.run_id, "loss/training")
    assert sorted((m.step, m.value) for m in loss) == [(1, 8.0), (2, 4.0), (3, 8.0 / 3)]
    assert found.data.metrics["loss/validation"] == 2.5
    assert "optimizer/gradient_norm" not in found.data.metrics


def test_a_server_that_is_away_is_told_of_once_and_costs_training_nothing(tmp_path, caplog):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        run = MlflowRun(RunDir(tmp_path / "tiny-abc123"), spec(f"http://127.0.0.1:{taken.getsockname()[1]}"))
        with caplog.at_level(logging.WARNING, "mhmoe"):
            run.tell(line(1))
            run.close("FINISHED")
    warnings = [r.getMessage() for r in caplog.records if r.name == "mhmoe"]
    assert len(warnings) == 2, warnings
    assert "trying again" in warnings[0]
    assert "2 numbers never reached MLflow" in warnings[1]


def test_without_mlflow_a_run_that_wants_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "mlflow", None)
    with pytest.raises(JobError, match=r"install mhmoe-ray\[mlflow\] where workers run"):
        MlflowRun(RunDir(tmp_path), spec("http://127.0.0.1:1"))


def test_an_address_that_is_none_is_a_users_mistake(tmp_path):
    with pytest.raises(JobError, match=r"tracking\.mlflow htp://host:5000"):
        MlflowRun(RunDir(tmp_path), spec("htp://host:5000"))
