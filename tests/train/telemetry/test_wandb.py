"""Tests of the metrics of a run in Weights & Biases, read from the files that its package writes offline."""

import numpy as np
import pytest

from mhmoe_ray.errors import JobError
from mhmoe_ray.runs import history, metrics
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.train.telemetry import tracker
from mhmoe_ray.train.telemetry.tracker import QueuedTracker
from mhmoe_ray.train.telemetry.wandb import WandbServer
from tests.support.events import LINE
from tests.support.offline_tracker import offline_history, offline_records
from tests.support.specs import tiny_spec


def open_tracker(run, start=0, mode="offline"):
    spec = tiny_spec(tracking={"wandb": mode, "experiment": "tests", "group": "sweep"})
    return QueuedTracker(WandbServer(run, spec), run, start)


@pytest.mark.long  # wandb starts its service from a thread
def test_continued_run_has_each_step_once_offline(tmp_path, monkeypatch):
    monkeypatch.setattr(tracker, "SEND_SECONDS", 0.05)
    run = RunDir(tmp_path / "tiny-abc123")
    run.path.mkdir()
    first_tracker = open_tracker(run)
    for step in (1, 2):
        history.append(run, {**LINE, metrics.STEP: step, metrics.LOSS: 8.0 / step})
        first_tracker.report({**LINE, metrics.STEP: step, metrics.LOSS: 8.0 / step}, None)
    assert first_tracker.finish("FAILED") == 0
    # The run goes on from a checkpoint at step 1, so it repeats step 2.
    second_tracker = open_tracker(run, start=1)
    for step in (2, 3):
        line = {**LINE, metrics.STEP: step, metrics.LOSS: 8.0 / step, metrics.VAL_LOSS: 2.5}
        second_tracker.report(line, np.array([[1.0, 1.0, 0.5, 1.5]]))
    second_tracker.report_checkpoint(run.checkpoints / "step_00000003.2")
    assert second_tracker.finish("FINISHED") == 0
    assert offline_history(run, "loss/training") == [(1, 8.0), (2, 4.0), (3, 8.0 / 3)]
    records = list(offline_records(run))
    record_by_type = {record.WhichOneof("record_type"): record for record in records}
    assert (
        record_by_type["run"].run.run_id,
        record_by_type["run"].run.run_group,
        record_by_type["run"].run.project,
    ) == (run.id, "sweep", "tests")
    keys = {item.key or item.nested_key[0] for item in record_by_type["history"].history.item}
    assert {"loss/validation", "expert_load/layer_0"} <= keys
    summary = {item.key: item.value_json for record in records for item in record.summary.update}
    assert "step_00000003.2" in summary["checkpoint"]


def test_missing_package_and_key_are_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(JobError, match="set WANDB_API_KEY where workers run"):
        open_tracker(RunDir(tmp_path), mode="online")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret")
    WandbServer(RunDir(tmp_path), tiny_spec(tracking={"wandb": "online"}))
    monkeypatch.setattr("mhmoe_ray.train.telemetry.wandb.find_spec", lambda _: None)
    with pytest.raises(JobError, match=r"install mhmoe-ray\[wandb\] where workers run"):
        open_tracker(RunDir(tmp_path))
