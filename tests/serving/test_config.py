import subprocess
import sys
from pathlib import Path

from mhmoe_ray.serving.config import SPARE_REQUESTS, application_config
from mhmoe_ray.spec import ServeSpec


def test_application_config_has_sizes_and_limits_of_the_spec():
    spec = ServeSpec(replicas=2, cpus_per_replica=3, max_concurrency=5, max_waiting=7)
    config = application_config("app", Path("/runs/a/checkpoints/step_00000001.1"), spec, "a")
    checkpoint = "/runs/a/checkpoints/step_00000001.1"
    assert config["args"] == {"checkpoint": checkpoint, "model": "a", "serve": spec.model_dump(mode="json")}
    (deployment,) = config["deployments"]
    assert deployment["num_replicas"] == 2
    assert deployment["ray_actor_options"] == {"num_cpus": 3, "num_gpus": 0}
    assert deployment["max_ongoing_requests"] == 5 + 7 + SPARE_REQUESTS
    assert deployment["max_queued_requests"] == 14 + SPARE_REQUESTS


def test_replicas_have_the_requested_runtime_env():
    checkpoint = Path("/runs/a/checkpoints/step_00000001.1")
    config = application_config("app", checkpoint, ServeSpec(), "a", runtime_env={"pip": ["x"]})
    assert config["runtime_env"] == {"pip": ["x"]}
    assert application_config("app", checkpoint, ServeSpec(), "a")["runtime_env"] == {}


def test_relative_checkpoint_counts_from_the_working_directory():
    config = application_config("app", Path("runs/a/checkpoints/c"), ServeSpec(), "a")
    assert config["args"]["checkpoint"] == str(Path.cwd() / "runs/a/checkpoints/c")


def test_config_imports_neither_torch_nor_ray():
    code = "import sys, mhmoe_ray.serving.config; print({'torch', 'ray', 'fastapi'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
