"""Test of a run during which the clock jumps."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mhmoe_ray.runs import history, metrics
from mhmoe_ray.storage import replace_file
from tests.cli.run import mhmoe, mhmoe_subprocess
from tests.faults import harness
from tests.support.watch import start_events, step_of, wait_for_end, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_run_whose_clock_jumps_equals_an_undisturbed_one(project, reference, tmp_path):
    """Commands that run meanwhile have a clock that is wrong by other hours."""

    def disturbed_environment(error_seconds: int) -> tuple[Path, dict[str, Any]]:
        clock = tmp_path / str(error_seconds)
        replace_file(clock, b"%d" % error_seconds)
        return clock, harness.disturbing_environment(CLOCK=str(clock))

    clock, environment = disturbed_environment(0)
    harness.write_random_spec(project, train={"steps": 120}, cluster=environment)
    run = harness.submit(project)
    for step, error_seconds in ((10, 3600), (40, -3600)):
        wait_until(lambda step=step: step_of(run) >= step, f"step {step}")
        replace_file(clock, b"%d" % error_seconds)
    for error_seconds in (3600, -3600):
        variables = disturbed_environment(error_seconds)[1]["runtime_env"]["env_vars"]
        status = mhmoe_subprocess(project, "status", str(run.path), **variables)
        assert (status.code, status.err) == (0, "")
        assert run.id in status.out
        assert not re.search(r"-\d", status.out.replace(run.id, "")), status.out
        print(status.out)
    wait_for_end(run)
    assert len(start_events(run)) == 1
    seconds = [line[metrics.TIME] - previous[metrics.TIME] for previous, line in pairwise(history.read(run))]
    assert min(seconds) < -3600 < 3600 < max(seconds)
    harness.assert_equals_undisturbed_run(run, reference)
    assert "120 of 120" in mhmoe(project, "status", str(run.path)).out
