"""Tests that the install commands of the container file work, each target's in an environment of its own."""

import shlex
import shutil
import subprocess
import time

import pytest

from mhmoe_ray.render.container import TARGET_PACKAGES, containerfile
from tests.support.environments import build_wheel, clean_environment, folder_bytes

# Modules of each target's packages, whose names and versions must fit together.
IMPORTS = {
    "serve": "mhmoe_ray.serving.vllm.plugin, torchvision, transformers, vllm",
    "train": "boto3, deepspeed, googleapiclient, lm_eval, mlflow, pycocotools, torchvision, wandb",
}


def run_commands(target):
    """Return the commands that build a target, each as words."""
    lines = containerfile().replace("\\\n", " ").splitlines()
    stages = {"base": []}
    for line in lines:
        if line.startswith("FROM "):
            stage = stages.setdefault(line.split(" AS ")[1], [])
        elif line.startswith("RUN "):
            stage += [shlex.split(command) for command in line.removeprefix("RUN ").split("&&")]
    return stages["base"] + stages[target]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.mark.system
@pytest.mark.parametrize("target", TARGET_PACKAGES)
def test_packages_of_a_target_fit_together(tmp_path, wheel, target):
    [install] = [words for words in run_commands(target) if words[0] == "pip"]
    assert install[3].startswith(f"/wheels/{wheel.name}[")
    install[3] = install[3].replace("/wheels", str(wheel.parent))
    environment, start = clean_environment(tmp_path / "venv"), time.monotonic()
    for command in (install, ["pip", "check"], ["python", "-W", "ignore", "-c", f"import {IMPORTS[target]}"]):
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    print(f"{target}: {folder_bytes(tmp_path / 'venv'):,} bytes in {time.monotonic() - start:.0f} s")
    # An environment has gigabytes, and pytest keeps the folders of several runs.
    shutil.rmtree(tmp_path / "venv")


@pytest.mark.system
@pytest.mark.skipif(shutil.which("apt-get") is None, reason="no apt-get")
def test_debian_has_the_packages_of_the_image():
    [install] = [words for words in run_commands("train") if words[:2] == ["apt-get", "install"]]
    simulated = subprocess.run([*install, "--simulate"], capture_output=True, text=True)
    assert simulated.returncode == 0, simulated.stderr
