"""Tests of services whose cluster is simulated; test_readme.py serves a model on a real one."""

import pytest

import mhmoe_ray as mh
from mhmoe_ray.api.serve_target import resolve_target
from mhmoe_ray.cluster.connect import connect
from mhmoe_ray.errors import CheckpointError, ServeError
from tests.checkpoint.huggingface.conftest import MIXTRAL, make_run
from tests.support.dashboards import dashboard


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a finished run with one checkpoint, in a process without named clusters."""
    monkeypatch.setenv("MHMOE_HOME", str(tmp_path))
    return make_run(tmp_path, MIXTRAL)


def test_a_service_is_found_on_its_cluster(run):
    with dashboard(run, "RUNNING") as (address, deployed):
        service = mh.find_service(address=address)
        assert (service.name, service.url) == ("mhmoe", "http://127.0.0.1:8000")
        assert service.checkpoint.name == "step_00000007.1"
        assert service.application.status == "RUNNING"
        for name in (None, 7, mh.Run(run).checkpoints()[0]):
            assert service.update(name) == ("step_00000007.1", False)
        with pytest.raises(CheckpointError, match="no checkpoint of this step; choose from step_00000007"):
            service.update(0)
        service.wait(timeout=1)
        with pytest.raises(ServeError, match="there is no such application"):
            mh.find_service("other", address)
        with pytest.raises(ServeError, match="it is gone from the cluster"):
            _ = mh.Service("other", connect(address)).url
        # The address of the service is a loopback address of the simulated cluster's machine.
        with pytest.raises(ServeError, match="is an address of the cluster's own machine"):
            service.stats()
    assert deployed == []


def test_a_service_that_failed_is_deployed_again(run):
    notes = []
    with dashboard(run, "DEPLOY_FAILED") as (address, deployed):
        service = mh.find_service(address=address)
        with pytest.raises(ServeError, match="no room"):
            service.wait()
        assert service.update(on_note=notes.append) == ("step_00000007.1", True)
    assert deployed == [str(run.checkpoints / "step_00000007.1")]
    assert notes == ["deploying step_00000007.1", "deploying step_00000007.1 again"]


def test_a_target_names_its_checkpoint_once(run):
    [checkpoint] = mh.Run(run).checkpoints()
    for target in (mh.Run(run), run.path, checkpoint, checkpoint.path):
        assert resolve_target(target, None, "runs")[:2] == (run, checkpoint.path)
    for name in (7, checkpoint, checkpoint.name):
        assert resolve_target(mh.Run(run), name, "runs")[1] == checkpoint.path
        with pytest.raises(CheckpointError, match="not a run with several; leave out the name of the checkpoint"):
            resolve_target(checkpoint, name, "runs")
