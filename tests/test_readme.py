"""Tests that README is short, and that the output, files and versions that it shows are right."""

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from tests.cli.run import mhmoe
from tests.versions import CORNERS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def code_block(language: str) -> str:
    """Return the first code block of README that is marked with this language."""
    return re.search(rf"^```{language}\n(.*?)^```", README, re.S | re.M)[1]


def test_readme_has_at_most_130_lines():
    assert len(README.splitlines()) <= 130


def test_readme_shows_the_plan_of_its_spec(tmp_path):
    (tmp_path / "spec.yaml").write_text(code_block("yaml"))
    assert len(code_block("yaml").splitlines()) == 12
    plan = mhmoe(tmp_path, "plan", "spec.yaml")
    assert plan.code == 0, plan.err
    shown_plan = re.search(r"^```\n(beside .*?)^```", README, re.S | re.M)[1]
    printed = [line.rstrip() for line in plan.out.splitlines()]
    for line in shown_plan.splitlines():
        assert line in printed, line


def test_wheel_that_the_readme_installs_has_the_current_version():
    """The commands below it are run by test_wheel.py."""
    assert f"pip install mhmoe_ray-{PROJECT['version']}-py3-none-any.whl" in code_block("sh")


def test_ratios_in_the_text_are_those_of_the_table():
    parameters, macs = re.search(r"ratios that remain: ([\d.]+) and ([\d.]+) below", README).groups()
    assert f"parameters                      300,734,208  307,747,584  {parameters}" in README
    assert re.search(rf"multiply-adds per token .* {macs}$", README, re.M)


@pytest.mark.parametrize("name", re.findall(r"`(tests/[\w/.]+)`", README))
def test_tests_that_the_readme_names_exist(name):
    assert (ROOT / name).exists()


def test_constraints_pin_every_dependency_to_an_allowed_version():
    constraints = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, _, pinned = line.partition("==")
            constraints[name] = pinned
    requirements = [*PROJECT["dependencies"], *sum(PROJECT["optional-dependencies"].values(), [])]
    for requirement in map(Requirement, requirements):
        name = requirement.name.lower().replace("_", "-")
        if name not in ("mhmoe-ray", "vllm"):  # vLLM has an environment of its own, without these constraints
            assert requirement.specifier.contains(constraints[name], prereleases=True), name


def test_version_table_has_the_corners_and_the_versions_that_the_project_asks_for():
    lines = [line.strip("| ").split(" | ") for line in README.splitlines() if line.startswith("|")]
    header = next(cells for cells in lines if cells[0] == "`make test-versions`")
    rows = {cells[0].split()[0]: dict(zip(header, cells, strict=True)) for cells in lines if len(cells) == len(header)}
    assert {name: rows[name]["Python"] for name in CORNERS} == {name: corner.python for name, corner in CORNERS.items()}
    constraints = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    for requirement in map(Requirement, PROJECT["dependencies"]):
        if requirement.name in header:
            assert [Version(spec.version) for spec in requirement.specifier] == [
                Version(rows["lowest"][requirement.name])
            ]
            assert rows["tested"][requirement.name] == constraints[requirement.name]


def test_citation_names_the_current_version_and_license():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"] == version("mhmoe-ray")
    assert citation["license"] == PROJECT["license"]
    assert "Apache License" in (ROOT / "LICENSE").read_text()
