"""Tests of profiles of runs on a real cluster, by the spec and by `mhmoe profile`."""

import gzip
import json

import pytest

from mhmoe_ray.runs import history, metrics
from mhmoe_ray.runs.profiles import read_profile
from tests.cli.conftest import write_spec
from tests.cli.run import assert_one_line, mhmoe
from tests.data.texts import write_corpus
from tests.support.watch import events_of_kind, newest_run, step_of, wait_for_end, wait_until

pytestmark = pytest.mark.ray


def test_profiles_of_a_spec_and_of_a_running_run(tmp_path, local_cluster):
    write_corpus(tmp_path / "raw")
    endless = {"steps": 100_000, "schedule": "constant", "validate_every": 50_000, "checkpoint_every": 50_000}
    write_spec(tmp_path, train={**endless, "profile": {"at": 3, "steps": 2}})
    assert mhmoe(tmp_path, "submit", "spec.yaml", "--detach").code == 0
    run = newest_run(tmp_path)
    [spec_event] = wait_until(lambda: events_of_kind(run, "profile"), "the profile of the spec")
    assert (spec_event["step"], spec_event["steps"], spec_event["name"]) == (3, 2, "step_00000003.1")

    result = mhmoe(tmp_path, "profile", run.id, "--steps", "2", "--json").json()
    assert (result["steps"], result["ranks"], result["missing_ranks"], result["device"]) == (2, 2, [], "cpu")
    assert result["step"] > 4
    seconds = {part: value["median"] for part, value in result["parts"].items()}
    assert {"data", "blocks: exchange", "blocks: experts", "weights and gradients", "update"} <= seconds.keys()
    assert "blocks: shared expert" not in seconds  # the model has none
    assert all(value["plan"] is None for value in result["parts"].values())
    assert not run.profile_request_file.exists()
    for name in (spec_event["name"], result["name"]):
        for rank, rank_profile in enumerate(read_profile(run, name)):
            assert sum(rank_profile.parts.values()) == pytest.approx(rank_profile.seconds)
            trace = json.loads(gzip.decompress((run.profiles / name / f"rank_{rank}.trace.json.gz").read_bytes()))
            assert {"mhmoe: step", "mhmoe: blocks: exchange"} <= {e.get("name") for e in trace["traceEvents"]}

    assert mhmoe(tmp_path, "stop", run.id).code == 0
    wait_for_end(run, state="stopped")
    ended_result = mhmoe(tmp_path, "profile", run.id)
    assert ended_result.code == 0, ended_result.err
    assert f"traces: {run.profiles / result['name']}" in ended_result.out
    assert "not that of CPUs" in ended_result.err

    write_spec(tmp_path, train={**endless, "steps": 10})
    assert mhmoe(tmp_path, "submit", "spec.yaml", "--set", "train.validate_every=10").code == 0
    plain_run = newest_run(tmp_path)
    assert step_of(plain_run) == 10
    losses, plain_losses = ([line[metrics.LOSS] for line in history.read(r)[:10]] for r in (run, plain_run))
    assert losses == plain_losses
    assert_one_line(mhmoe(tmp_path, "profile", plain_run.id), 7, "it has ended and has no profile", "train.profile")
