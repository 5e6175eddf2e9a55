"""Tests of `mhmoe serve update` where Serve already has the configuration of the newest checkpoint.

The dashboard of the cluster is simulated.
"""

import pytest

from mhmoe_ray.checkpoint.manifest import committed_checkpoints
from tests.checkpoint.huggingface.conftest import MIXTRAL, make_run
from tests.cli.run import mhmoe
from tests.support.dashboards import dashboard


@pytest.fixture
def run(tmp_path):
    """Return a finished run with one checkpoint, stored below `tmp_path`/runs."""
    return make_run(tmp_path, MIXTRAL)


def update(folder, address, *words):
    """Run `mhmoe serve update` with this cluster address, in a folder that is its MHMOE_HOME too."""
    return mhmoe(folder, "serve", "update", "--address", address, *words, MHMOE_HOME=str(folder))


def test_update_leaves_a_running_application_alone(tmp_path, run):
    with dashboard(run, "RUNNING") as (address, deployed):
        assert update(tmp_path, address).out == "step_00000007.1 is the newest checkpoint, and is served\n"
        assert update(tmp_path, address, "--checkpoint", "step_00000007.1").out == "step_00000007.1 is served\n"
    assert deployed == []


def test_update_waits_for_a_deployment_in_progress(tmp_path, run):
    with dashboard(run, "DEPLOYING", "DEPLOYING", "DEPLOYING", "RUNNING") as (address, deployed):
        updated = update(tmp_path, address)
    assert updated.out == "step_00000007.1 is the newest checkpoint, and is served\n"
    assert updated.err.splitlines()[0] == "step_00000007.1 is being deployed already"
    with dashboard(run, "DEPLOYING", "DEPLOYING", "DEPLOY_FAILED") as (address, later_deployed):
        assert update(tmp_path, address).code == 10
    assert deployed == later_deployed == []


def test_update_deploys_a_failed_application_again(tmp_path, run):
    [checkpoint] = committed_checkpoints(run)
    with dashboard(run, "DEPLOY_FAILED") as (address, deployed):
        updated = update(tmp_path, address)
    assert (updated.code, updated.out) == (0, "serving step_00000007.1\n"), updated.err
    assert updated.err.splitlines()[0] == "deploying step_00000007.1 again"
    assert deployed == [str(checkpoint)]
