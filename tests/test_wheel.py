"""Tests that a wheel contains every file, and that README's first commands work with it alone.

All other tests run on an editable installation, which cannot show a missing file.
"""

import re
import shlex
import shutil
import subprocess
import time
import zipfile
from pathlib import Path

import httpx
import pytest

from tests.support.environments import PACKAGES, build_wheel, clean_environment, folder_bytes

ROOT = Path(__file__).parents[1]
NOT_PACKAGED = {"README.md", "MEASURED.md"}
FIRST_COMMANDS = re.search(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)[1].splitlines()


@pytest.fixture(scope="module")
def wheel_path(tmp_path_factory):
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def wheel(wheel_path):
    """Yield the wheel as an open zip archive."""
    with zipfile.ZipFile(wheel_path) as opened:
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


@pytest.mark.system
def test_first_commands_of_the_readme_work_in_an_empty_environment(wheel_path, tmp_path, unused_port):
    environment = clean_environment(tmp_path / "venv") | {
        "MHMOE_HOME": str(tmp_path / "home"),
        "PIP_CONSTRAINT": str(ROOT / "constraints.txt"),
    }
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(wheel_path, folder)
    shutil.copy(ROOT / "mhmoe_ray/data/README.md", folder / "text.txt")

    def run(line):
        start = time.monotonic()
        result = subprocess.run(
            shlex.split(line, comments=True), cwd=folder, env=environment, capture_output=True, text=True
        )
        print(f"{time.monotonic() - start:5.0f} s  {line}")
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout + result.stderr

    install, *commands, deploy = FIRST_COMMANDS
    run(install)
    print(f"{wheel_path.stat().st_size:,} bytes of the wheel, {folder_bytes(tmp_path / 'venv'):,} bytes installed")
    try:
        for line in commands:
            output = run(line)
        assert "finished" in output
        output = run(f"{deploy.partition('#')[0]} --set serve.port={unused_port}")
        ask = re.search(r"ask it: curl (\S+) .* -d '(.*)'", output)
        answer = httpx.post(ask[1], content=ask[2], headers={"Content-Type": "application/json"}, timeout=60)
        assert answer.json()["choices"][0]["text"]
    finally:
        run("mhmoe cluster down")
