"""A local Ray with Serve on it, and the actions of Serve's REST API.

The API itself would need a dashboard, which is slow to start.
"""

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

from mhmoe_ray.serve.config import DEPLOYMENT, ENVIRONMENT

from .conftest import free_port

with warnings.catch_warnings():
    # Ray's own models use what newer releases of pydantic deprecate.
    warnings.simplefilter("ignore", PydanticDeprecatedSince20)
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema


@contextmanager
def serving(cpus: int = 4) -> Iterator[int]:
    """Start Ray under a token of its own and Serve on it, and yield Serve's port."""
    # Sockets have short names only; pytest's own folders are too deep for Ray's.
    temp = Path(tempfile.mkdtemp(prefix="mhmoe-"))
    (temp / "token").write_text(secrets.token_hex(16))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(temp / "token"))
        for name, value in ENVIRONMENT.items():  # as in a local cluster of ours
            patch.setenv(name, value)
        reset_auth_token_state()  # Ray reads both once, when it is imported
        try:
            ray.init("local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, _temp_dir=str(temp / "ray"))
            port = free_port()
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            yield port
            serve.shutdown()
        finally:
            ray.shutdown()
    reset_auth_token_state()
    shutil.rmtree(temp)


def deploy(applications: list[dict[str, Any]]) -> None:
    """Deploy applications as a PUT to Serve's REST API does."""
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate({"applications": applications}))


def details(name: str) -> dict[str, Any]:
    """Return the details of an application as a GET to Serve's REST API does."""
    return _get_global_client().get_serve_details()["applications"][name]


def wait_until(name: str, *statuses: str) -> None:
    while (found := details(name))["status"] not in statuses:
        assert found["status"] == "DEPLOYING", found
        time.sleep(0.1)


def running(name: str) -> list[str]:
    """Return the ids of the application's replicas that answer."""
    replicas = details(name)["deployments"][DEPLOYMENT]["replicas"]
    return [replica["replica_id"] for replica in replicas if replica["state"] == "RUNNING"]
