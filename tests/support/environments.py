"""A wheel of the project, and virtual environments that have nothing of its checkout."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("mhmoe_ray", "kernels/mhmoe_kernels")


def build_wheel(folder: Path) -> Path:
    """Build a wheel of the project in `folder`, and return its path."""
    # setuptools leaves folders behind where it builds, so it builds in a copy of the project.
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "out", "."]
    result = subprocess.run(build, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    [path] = (folder / "out").iterdir()
    return path


def clean_environment(folder: Path, python: str = sys.executable) -> dict[str, str]:
    """Create a virtual environment, and return the variables with which processes use it alone."""
    subprocess.run([python, "-m", "venv", folder], check=True)
    # Variables of the tests and of a developer's shell would bring in the checkout or its cluster.
    prefixes = ("MHMOE_", "PYTEST", "PYTHON", "RAY_", "VIRTUAL_ENV")
    variables = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
    # pip would compile every module, which takes longer than the installation.
    return variables | {"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}", "PIP_NO_COMPILE": "1"}


def folder_bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*"))
