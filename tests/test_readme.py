"""README is short, and the output that it shows is what the commands print."""

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from tests.cli.run import mhmoe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def block(language: str) -> str:
    return re.search(rf"^```{language}\n(.*?)^```", README, re.S | re.M)[1]


def test_it_is_read_in_minutes():
    assert len(README.splitlines()) <= 130


def test_its_spec_gives_the_plan_that_is_shown(tmp_path):
    (tmp_path / "spec.yaml").write_text(block("yaml"))
    assert len(block("yaml").splitlines()) == 12
    plan = mhmoe(tmp_path, "plan", "spec.yaml")
    assert plan.code == 0, plan.err
    shown_plan = re.search(r"^```\n(beside .*?)^```", README, re.S | re.M)[1]
    printed = [line.rstrip() for line in plan.out.splitlines()]
    for line in shown_plan.splitlines():
        assert line in printed, line


def test_its_commands_are_targets_of_the_makefile():
    """The commands are `make test` and `make quickstart`; the tests of test_quickstart.py run what the latter runs."""
    makefile = (ROOT / "Makefile").read_text()
    for line in block("sh").splitlines():
        program, target = line.split("#")[0].split()
        assert program == "make"
        assert re.search(rf"^{target}:", makefile, re.M)


def test_its_ratios_are_those_of_its_table():
    parameters, macs = re.search(r"ratios that remain: ([\d.]+) and ([\d.]+) below", README).groups()
    assert f"parameters                      300,734,208  307,747,584  {parameters}" in README
    assert re.search(rf"multiply-adds per token .* {macs}$", README, re.M)


@pytest.mark.parametrize("name", re.findall(r"`(tests/[\w/.]+)`", README))
def test_tests_that_it_names_are_there(name):
    assert (ROOT / name).exists()


def test_constraints_name_every_dependency_in_a_version_that_the_project_takes():
    constraints = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, _, pinned = line.partition("==")
            constraints[name] = pinned
    requirements = [*PROJECT["dependencies"], *sum(PROJECT["optional-dependencies"].values(), [])]
    for requirement in map(Requirement, requirements):
        name = requirement.name.lower().replace("_", "-")
        if name not in ("mhmoe-ray", "vllm"):  # the latter is installed apart
            assert requirement.specifier.contains(constraints[name], prereleases=True), name


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"] == version("mhmoe-ray")
    assert citation["license"] == PROJECT["license"]
    assert "Apache License" in (ROOT / "LICENSE").read_text()
