"""The configuration of Serve, which is one for all applications, over the dashboard's REST API.

It is put whole, so whoever changes it reads it first, and nobody else may change it in between. For commands that share
a home a lock sees to that; Serve itself knows none.
"""

import functools
import hashlib
import logging
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from mhmoe_ray.cluster import dashboard
from mhmoe_ray.cluster.connect import Connection
from mhmoe_ray.cluster.dashboard import Patience
from mhmoe_ray.cluster.tokens import locked
from mhmoe_ray.errors import ServeError
from mhmoe_ray.ray_compat import SDK_LOGGERS

END_SECONDS = 150.0
"""Several times what one request for it waits, half a minute."""


@functools.cache
def client(connection: Connection) -> Any:
    """Ray's own, which takes longer to import than all else that `mhmoe status` does."""
    from mhmoe_ray.ray_compat import ServeSubmissionClient

    logging.getLogger(SDK_LOGGERS[0]).setLevel(logging.WARNING)  # it tells of every upload
    return ServeSubmissionClient(connection.address, headers=connection.headers)


def get(connection: Connection, seconds: float = 60) -> dict[str, Any]:
    """What Serve tells of itself: `applications` by name, `http_options` and more.

    Args:
        connection: the cluster.
        seconds: that an answer may take; the dashboard joins Ray for the first.

    Raises:
        ClusterError, TokenError: as `dashboard.get`.
    """
    path = "/api/serve/applications/"
    details: dict[str, Any] = dashboard.get(connection.address, path, connection.token, seconds=seconds)
    return details


def configs(details: dict[str, Any]) -> list[dict[str, Any]]:
    """Those in force. Applications of `serve.run` have none and stay whatever we put."""
    return [a["deployed_app_config"] for a in details["applications"].values() if a["deployed_app_config"]]


def changing(connection: Connection) -> AbstractContextManager[Path]:
    """Hold this from the question on which a change is built until it is put."""
    cluster = "" if connection.local else f"-{hashlib.sha256(connection.address.encode()).hexdigest()[:8]}"
    return locked(f"serve{cluster}.lock")


def replace(connection: Connection, name: str, config: dict[str, Any] | None, patience: Patience) -> None:
    """Another configuration for an application, or none: then Serve removes it. Nothing if it is gone.

    Raises:
        ClusterError, TokenError: as `Patience.ask`.
    """
    with changing(connection):
        while (details := patience.ask(functools.partial(get, connection), None)) is None:
            time.sleep(0.2)
        others = [c for c in configs(details) if c["name"] != name]
        if len(others) < len(configs(details)):
            put(connection, details, [*others, *([config] if config else [])], details["http_options"])


def put(connection: Connection, details: dict[str, Any], configs: list[dict[str, Any]], http: dict[str, Any]) -> None:
    """All that is to stay; what is missing ends."""
    config = {"applications": configs, "http_options": http}
    if details.get("proxy_location"):
        config["proxy_location"] = details["proxy_location"]
    if details.get("target_capacity") is not None:
        config["target_capacity"] = details["target_capacity"]
    client(connection).deploy_applications(config)


def end_idle(connection: Connection) -> dict[str, Any]:
    """End Serve itself, which frees its port, unless it has applications. To be asked under `changing`: one that is
    just started for a configuration has none yet.

    Returns:
        What Serve tells then.

    Raises:
        ServeError: it does not end.
        ClusterError, TokenError: as `dashboard.get`.
    """
    deadline = time.monotonic() + END_SECONDS
    while (details := get(connection)).get("http_options") and not details["applications"]:
        if time.monotonic() > deadline:
            raise ServeError("Ray Serve", f"it does not end within {END_SECONDS:.0f} s", "see the dashboard")
        # That is said to be done, too, where Serve was too busy to hear of it, or had not ended in time.
        client(connection).delete_applications()
        time.sleep(0.2)
    return details
