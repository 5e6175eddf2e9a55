"""Test of a run during which the clock jumps."""

import re

import pytest

from tests.cli.run import mhmoe_subprocess
from tests.faults import harness
from tests.support.watch import step_of, wait_for_end, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_run_whose_clock_jumps_equals_an_undisturbed_one(project, reference, tmp_path):
    clock = tmp_path / "seconds"
    clock.write_text("0")
    environment = harness.disturbing_environment(CLOCK=str(clock))
    harness.write_random_spec(project, train={"steps": 120}, cluster=environment)
    run = harness.submit(project)
    for step, seconds in ((20, 3600), (50, -3600)):
        wait_until(lambda step=step: step_of(run) >= step, f"step {step}")
        assert step_of(run) < 100
        clock.write_text(str(seconds))
        status = mhmoe_subprocess(project, "status", str(run.path), **environment["runtime_env"]["env_vars"])
        assert (status.code, "Traceback" in status.err) == (0, False), status.err
        assert not re.search(r"-\d", status.out.replace(run.id, "")), status.out
        print(status.out)
    wait_for_end(run)
    harness.assert_equals_undisturbed_run(run, reference)
    status = mhmoe_subprocess(project, "status", str(run.path), **environment["runtime_env"]["env_vars"])
    print(status.out)
    assert "finished" in status.out
    assert "120 of 120" in status.out
