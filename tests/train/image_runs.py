"""Helpers that the tests of encoder runs and of vision runs share; each run trains `spec.yaml` of a project folder."""

from pathlib import Path

from mhmoe_ray.checkpoint.manifest import CheckpointManifest, committed_checkpoints, read_manifest
from mhmoe_ray.runs import history, metrics
from mhmoe_ray.runs.directory import RunDir
from tests.cli.run import mhmoe
from tests.faults import harness
from tests.support.watch import newest_run, start_events, wait_for_end


def train_to_end(folder: Path) -> RunDir:
    """Train a run to its end, and return it."""
    result = mhmoe(folder, "submit", "spec.yaml")
    assert result.code == 0, result.err
    return newest_run(folder)


def streams(run: RunDir) -> list[str]:
    """Return the digest of the samples of each step."""
    return [line[metrics.STREAM] for line in history.read(run)]


def assert_a_kill_changes_nothing(
    folder: Path, undisturbed_run: RunDir
) -> tuple[CheckpointManifest, CheckpointManifest]:
    """Train a run, kill one of its two workers, and assert that the run ends as an undisturbed one, to the last bit.

    Return the manifests of the last checkpoints of both runs.
    """
    run = harness.submit(folder)
    [worker, _] = harness.workers_of_start(run, 1)
    assert harness.kill(worker["pid"])
    wait_for_end(run)
    assert len(start_events(run)) == 2
    assert streams(run) == streams(undisturbed_run)
    losses, expected_losses = ([line[metrics.LOSS] for line in history.read(r)] for r in (run, undisturbed_run))
    assert losses == expected_losses
    killed, undisturbed = (read_manifest(committed_checkpoints(r)[-1]) for r in (run, undisturbed_run))
    assert killed.files == undisturbed.files
    return killed, undisturbed


def assert_refused(folder: Path, arguments: list[str], error: str) -> None:
    """Assert that a command fails with one line that contains `error`."""
    result = mhmoe(folder, *arguments)
    assert result.code != 0
    assert error in result.err.splitlines()[-1]
    assert "Traceback" not in result.err
