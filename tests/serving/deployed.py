"""A local Ray with Serve, and functions that replace Serve's REST API, which would need Ray's slow dashboard."""

import secrets
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from pydantic import PydanticDeprecatedSince20
from ray._private.authentication_test_utils import reset_auth_token_state

from mhmoe_ray.serving.config import DEPLOYMENT, ENVIRONMENT

from .conftest import free_port

with warnings.catch_warnings():
    # Ignore warnings about Ray's own models, which use what newer releases of pydantic deprecate.
    warnings.simplefilter("ignore", PydanticDeprecatedSince20)
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema


@contextmanager
def start_ray_serve(cpus: int = 4) -> Iterator[int]:
    """Start Ray with a new token and Serve on it, yield Serve's port, and stop both at the end of the block."""
    # The folder is not below pytest's folders, because paths of Ray's sockets would be too long there.
    temp_folder = Path(tempfile.mkdtemp(prefix="mhmoe-"))
    (temp_folder / "token").write_text(secrets.token_hex(16))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(temp_folder / "token"))
        # Set the same variables as for a local cluster of this project.
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        reset_auth_token_state()  # Ray has cached the old mode and token
        try:
            ray.init(
                "local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, _temp_dir=str(temp_folder / "ray")
            )
            port = free_port()
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            yield port
            serve.shutdown()
        finally:
            ray.shutdown()
    reset_auth_token_state()
    shutil.rmtree(temp_folder)


def deploy(applications: list[dict[str, Any]]) -> None:
    """Deploy applications as a PUT to Serve's REST API does."""
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate({"applications": applications}))


def application_details(name: str) -> dict[str, Any]:
    """Return the details of an application as a GET to Serve's REST API does."""
    return _get_global_client().get_serve_details()["applications"][name]


def wait_for_status(name: str, *statuses: str) -> None:
    """Wait until the application has one of these statuses; fail if it gets another one than DEPLOYING."""
    while (application := application_details(name))["status"] not in statuses:
        assert application["status"] == "DEPLOYING", application
        time.sleep(0.1)


def running_replicas(name: str) -> list[str]:
    """Return the ids of the application's running replicas."""
    replicas = application_details(name)["deployments"][DEPLOYMENT]["replicas"]
    return [replica["replica_id"] for replica in replicas if replica["state"] == "RUNNING"]
