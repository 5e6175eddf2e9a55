"""Tests of the folder of run directories: `--storage`, else the spec's `storage`, else MHMOE_STORAGE, else `runs`."""

from pathlib import Path

import pytest
import yaml

from tests.cli.run import mhmoe

JOBS = Path(__file__).parents[2] / "jobs"


@pytest.fixture
def specs(tmp_path):
    """Write a spec and a sweep with it into the current folder, and return a function that sets the spec's storage."""
    tree = yaml.safe_load((JOBS / "quickstart.yaml").read_text())
    (tmp_path / "sweep.yaml").write_text(
        yaml.safe_dump({"name": "seeds", "sizes": {"small": {"spec": "spec.yaml"}}, "runs": {"only": {}}, "seeds": [0]})
    )

    def write_spec(**storage):
        (tmp_path / "spec.yaml").write_text(yaml.safe_dump({**tree, **storage}))

    write_spec()
    return write_spec


COMMANDS = {
    "plan": (("plan", "spec.yaml", "--json"), lambda result: result.json()["spec"]["storage"]),
    "sweep": (("sweep", "sweep.yaml", "--dry-run", "--json"), lambda result: result.json()[0]["spec"]["storage"]),
    "serve": (("serve", "deploy", "spec.yaml"), lambda result: result.err.split(": ")[2].split()[0]),
    "status": (("status",), lambda result: result.err.split(": ")[1].split()[1]),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_all_commands_find_runs_by_one_rule(tmp_path, specs, command):
    words, folder_of = COMMANDS[command]

    def folder(*options, **env):
        return str(tmp_path / folder_of(mhmoe(tmp_path, *words, *options, MHMOE_HOME=str(tmp_path), **env)))

    assert folder() == str(tmp_path / "runs")
    assert folder(MHMOE_STORAGE="variable") == str(tmp_path / "variable")
    specs(storage="own")
    own_folder = "variable" if command == "status" else "own"
    assert folder(MHMOE_STORAGE="variable") == str(tmp_path / own_folder)
    assert folder("--storage", "option", MHMOE_STORAGE="variable") == str(tmp_path / "option")


def test_submit_takes_the_storage_option(tmp_path, specs):
    words = ("submit", "spec.yaml", "--dry-run", "--storage", "option")
    result = mhmoe(tmp_path, *words, MHMOE_HOME=str(tmp_path), MHMOE_STORAGE="variable")
    assert str(tmp_path / "option" / "quickstart-xxxxxx") in str(result.json())
