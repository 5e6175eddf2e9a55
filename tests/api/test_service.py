"""Tests of services whose cluster is simulated; test_readme.py serves a model on a real one."""

import pytest

import mhmoe_ray as mh
from mhmoe_ray.cluster.connect import connect
from mhmoe_ray.errors import ServeError
from tests.checkpoint.huggingface.conftest import MIXTRAL, make_run
from tests.cli.test_serve_update import dashboard


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
        assert service.update() == ("step_00000007.1", False)
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
    assert notes == ["deploying step_00000007.1 again"]
