"""The output of `list` and `status` while runs are stopped, killed and resumed, and the head of their cluster dies."""

import os
import signal

import pytest

from mhmoe_ray.cluster import spawn
from mhmoe_ray.runs.directory import RunDir
from tests.cli.run import mhmoe
from tests.several_nodes.conftest import several
from tests.several_nodes.runs import command, submit
from tests.watch import started, step_of, wait_for_the_end, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SIZES = {"cluster": {"workers": 2, "max_failures": 0}}


def test_list_and_status_are_right_at_every_moment(tmp_path, project):
    def listed() -> dict[str, str]:
        return {row["run"]: row["state"] for row in command(nodes, project, "list", "--json").json()}

    def status(run: RunDir) -> dict:
        return command(nodes, project, "status", run.id, "--json").json()

    with several(tmp_path / "home", tmp_path / "elsewhere") as nodes:
        first = submit(nodes, project, **SIZES)
        second = submit(nodes, project, **SIZES)
        others = listed().keys() - {first.id, second.id}

        def states() -> tuple[str, str]:
            found = listed()
            assert found.keys() - {first.id, second.id} == others
            return found[first.id], found[second.id]

        for run in (first, second):
            wait_until(lambda run=run: step_of(run) >= 12, "step 12")
            told = status(run)
            assert (told["state"], told["cluster"]) == ("running", "the job is alive")
            assert [w["rank"] for w in told["started"]["workers"]] == [0, 1]
        assert states() == ("running", "running")

        assert command(nodes, project, "stop", first.id).code == 0
        assert states() == ("stopped", "running")
        assert status(first)["checkpoint"]["step"] == status(first)["last"]["step"]

        killed = status(second)["started"]["workers"][1]
        os.kill(killed["pid"], signal.SIGKILL)
        wait_for_the_end(second, state="failed")
        assert states() == ("stopped", "failed")
        [cut] = status(second)["interruptions"]
        assert cut["what"].startswith(f"rank 1 on {killed['host']} failed")

        resumed = command(nodes, project, "resume", second.id, "--detach", "--address", nodes.address)
        assert resumed.code == 0, resumed.err
        assert states()[1] in ("submitted", "preparing", "running")
        wait_until(lambda: len(started(second)) == 2, "start 2 of the workers")
        wait_until(lambda: step_of(second) >= started(second)[1]["step"] + 3, "three steps more")
        assert states() == ("stopped", "running")
        assert started(second)[1]["step"] % 10 == 0

        for process in spawn.family(nodes.head.pid):
            process.kill()
        wait_until(lambda: states() == ("stopped", "unknown"), "the head's death")
        assert "nothing answers there" in status(second)["cluster"]
        assert status(second)["last"]["step"] == step_of(second)
        refused = command(nodes, project, "resume", second.id, "--address", nodes.address)
        assert (refused.code, "its cluster does not answer" in refused.err) == (7, True), refused

    with several(tmp_path / "home", tmp_path / "elsewhere") as nodes:  # another head, with other ports
        assert states() == ("stopped", "unknown")
        at = step_of(second)
        again = command(nodes, project, "resume", second.id, "--detach", "--force", "--address", nodes.address)
        assert again.code == 0, again.err
        wait_until(lambda: len(started(second)) == 3, "start 3 of the workers")
        assert 0 <= at - started(second)[2]["step"] <= 10
        wait_until(lambda: step_of(second) > started(second)[2]["step"], "a step more")
        assert states() == ("stopped", "running")
        assert command(nodes, project, "stop", second.id, "--now").code == 0
        assert states() == ("stopped", "stopped")
    assert mhmoe(project, "list", "--json", "--state", "running").json() == []
