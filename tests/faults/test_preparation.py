"""Test of a data preparation whose worker and driver are killed."""

import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from mhmoe_ray.cluster.spawn import LocalCluster, process_tree
from tests.cli.conftest import write_spec
from tests.cli.run import command, mhmoe
from tests.data.texts import make_documents, write_documents
from tests.faults import harness
from tests.support.watch import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def pids_with_word(cluster: LocalCluster, word: str) -> set[int]:
    """Return the processes of the cluster with `word` in their command line, which for a worker is its task's name."""
    pids = set()
    for process in process_tree(cluster.pid):
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        # The shell that starts a driver has the driver's words in its own command line.
        if any(word in w for w in words) and "sh" not in Path(words[0]).name:
            pids.add(process.pid)
    return pids


@pytest.mark.timeout(600)
def test_a_preparation_survives_the_death_of_a_worker_and_of_its_driver(tmp_path, local_cluster):
    for number in range(4):
        write_documents(tmp_path / f"raw/{number}/one.jsonl", make_documents(str(number), 4000))
    write_spec(tmp_path, data={"prepared": tmp_path / "undisturbed"})
    assert mhmoe(tmp_path, "data", "prepare", "spec.yaml").code == 0
    write_spec(tmp_path, data={"prepared": tmp_path / "disturbed"})
    words = command("data", "prepare", "spec.yaml")
    first_command = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        [driver] = wait_until(lambda: pids_with_word(local_cluster, "mhmoe_ray.data.prepare.job"), "the driver")
        victims = wait_until(lambda: pids_with_word(local_cluster, "ray::MapBatches"), "a worker with a task")
        assert harness.kill(max(victims))
        wait_until(lambda: list(tmp_path.glob("disturbed.partial-*/parts/*/*.json")), "the first part")
        harness.kill(driver, signal.SIGSTOP)
        assert not (tmp_path / "disturbed").exists()
        assert harness.kill(driver)
        err = first_command.communicate(timeout=200)[1]
    finally:
        first_command.kill()
    assert (first_command.returncode, "Traceback" in err) == (9, False), err
    assert err.splitlines()[-1].startswith("error: prepared data ")
    result = mhmoe(tmp_path, "data", "prepare", "spec.yaml")
    assert result.code == 0, result.err
    harness.assert_same_files(tmp_path / "disturbed", tmp_path / "undisturbed")
    assert {p.name for p in tmp_path.iterdir()} == {"raw", "spec.yaml", "undisturbed", "disturbed"}
