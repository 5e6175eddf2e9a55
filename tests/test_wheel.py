"""Tests that a wheel contains every file.

All other tests run on an editable installation, which cannot show a missing one.
"""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("mhmoe_ray", "kernels/mhmoe_kernels")
NOT_PACKAGED = {"README.md"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build a wheel of the project, and yield it as an open zip archive."""
    # setuptools leaves folders behind where it builds, so it builds in a copy of the project.
    copy = tmp_path_factory.mktemp("source")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "out", "."]
    result = subprocess.run(build, cwd=copy, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    [path] = (copy / "out").iterdir()
    with zipfile.ZipFile(path) as opened:
        yield opened


def test_wheel_has_every_file_of_the_packages(wheel):
    files = {
        str(path.relative_to((ROOT / package).parent))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.parent.name != "__pycache__" and path.name not in NOT_PACKAGED
    }
    wheel_files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert wheel_files == files


def test_wheel_declares_the_command_and_the_vllm_plugin(wheel):
    [name] = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    entry_points = wheel.read(name).decode()
    assert "mhmoe = mhmoe_ray.cli.app:main" in entry_points
    assert "mhmoe = mhmoe_ray.serving.vllm.plugin:register" in entry_points
