"""Test of `mhmoe list` and `mhmoe status` while runs are stopped, killed and resumed, and the cluster's head dies."""

import os
import signal

import pytest

from mhmoe_ray.cluster import spawn
from mhmoe_ray.runs.directory import RunDir
from tests.cli.run import mhmoe
from tests.several_nodes.conftest import cluster_of_nodes
from tests.several_nodes.runs import run_command, submit
from tests.support.watch import start_events, step_of, wait_for_end, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SIZES = {"cluster": {"workers": 2, "max_failures": 0}}


def test_list_and_status_show_the_current_state_of_runs(tmp_path, project):
    def state_by_run() -> dict[str, str]:
        return {row["run"]: row["state"] for row in run_command(nodes, project, "list", "--json").json()}

    def status(run: RunDir) -> dict:
        return run_command(nodes, project, "status", run.id, "--json").json()

    with cluster_of_nodes(tmp_path / "home", tmp_path / "elsewhere") as nodes:
        first_run = submit(nodes, project, **SIZES)
        second_run = submit(nodes, project, **SIZES)
        other_runs = state_by_run().keys() - {first_run.id, second_run.id}

        def states() -> tuple[str, str]:
            current_states = state_by_run()
            assert current_states.keys() - {first_run.id, second_run.id} == other_runs
            return current_states[first_run.id], current_states[second_run.id]

        for run in (first_run, second_run):
            wait_until(lambda run=run: step_of(run) >= 12, "step 12")
            status_json = status(run)
            assert (status_json["state"], status_json["cluster"]) == ("running", "the job is alive")
            assert [w["rank"] for w in status_json["started"]["workers"]] == [0, 1]
        assert states() == ("running", "running")

        assert run_command(nodes, project, "stop", first_run.id).code == 0
        assert states() == ("stopped", "running")
        assert status(first_run)["checkpoint"]["step"] == status(first_run)["last"]["step"]

        killed_worker = status(second_run)["started"]["workers"][1]
        os.kill(killed_worker["pid"], signal.SIGKILL)
        wait_for_end(second_run, state="failed")
        assert states() == ("stopped", "failed")
        [interruption] = status(second_run)["interruptions"]
        assert interruption["what"].startswith(f"rank 1 on {killed_worker['host']} failed")

        resumed = run_command(nodes, project, "resume", second_run.id, "--detach", "--address", nodes.address)
        assert resumed.code == 0, resumed.err
        assert states()[1] in ("submitted", "preparing", "running")
        wait_until(lambda: len(start_events(second_run)) == 2, "start 2 of the workers")
        wait_until(lambda: step_of(second_run) >= start_events(second_run)[1]["step"] + 3, "three steps more")
        assert states() == ("stopped", "running")
        assert start_events(second_run)[1]["step"] % 10 == 0

        for process in spawn.process_tree(nodes.head.pid):
            process.kill()
        wait_until(lambda: states() == ("stopped", "unknown"), "the head's death")
        assert "nothing answers there" in status(second_run)["cluster"]
        assert status(second_run)["last"]["step"] == step_of(second_run)
        result = run_command(nodes, project, "resume", second_run.id, "--address", nodes.address)
        assert (result.code, "its cluster does not answer" in result.err) == (7, True), result

    # This new cluster takes the place of the one whose head died. Its head has other ports.
    with cluster_of_nodes(tmp_path / "home", tmp_path / "elsewhere") as nodes:
        assert states() == ("stopped", "unknown")
        step_before = step_of(second_run)
        resumption = run_command(
            nodes, project, "resume", second_run.id, "--detach", "--force", "--address", nodes.address
        )
        assert resumption.code == 0, resumption.err
        wait_until(lambda: len(start_events(second_run)) == 3, "start 3 of the workers")
        assert 0 <= step_before - start_events(second_run)[2]["step"] <= 10
        wait_until(lambda: step_of(second_run) > start_events(second_run)[2]["step"], "a step more")
        assert states() == ("stopped", "running")
        assert run_command(nodes, project, "stop", second_run.id, "--now").code == 0
        assert states() == ("stopped", "stopped")
    assert mhmoe(project, "list", "--json", "--state", "running").json() == []
