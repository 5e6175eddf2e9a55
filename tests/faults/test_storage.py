"""A whole run on an object store: submitted, hurt, resumed, looked at and served from there."""

import pytest

from mhmoe_ray.location import location
from mhmoe_ray.runs.layout import list_runs
from tests.cli.run import mhmoe
from tests.faults import harness
from tests.s3 import CREDENTIALS

pytestmark = pytest.mark.ray


def test_a_run_on_s3_outlives_its_kills(project, reference, s3):
    query, _ = s3
    storage = f"s3://bucket/runs?{query}"
    harness.spec_in(project, train={"steps": 120}, cluster={"runtime_env": {"env_vars": CREDENTIALS}})
    submitted = mhmoe(project, "submit", "spec.yaml", "--set", f"storage={storage}", "--detach")
    assert submitted.code == 0, submitted.err
    [run] = list_runs(storage)
    own = harness.workers(run, 1)
    harness.wait_until(lambda: harness.of_kind(run, "checkpoint"), "a checkpoint")
    assert harness.kill(own[0]["pid"])
    harness.workers(run, 2)
    stopped = mhmoe(project, "stop", run.id, "--storage", storage)
    assert stopped.out == f"run {run.id} stopped\n", stopped
    resumed = mhmoe(project, "resume", run.id, "--storage", storage)
    assert resumed.code == 0, resumed.err
    harness.assert_as_if_nothing_had_happened(run, reference)
    assert "120 of 120" in mhmoe(project, "status", "--storage", storage).out
    assert run.id in mhmoe(project, "list", "--storage", storage).out
    assert mhmoe(project, "ckpt", "verify", run.id, "--storage", storage).code == 0
    assert location(storage) == run.path.parent
