"""Client of Ray Serve's configuration, which all applications of a cluster share, over the dashboard's REST API.

A change replaces the whole configuration, so nobody may change it between the requests that read and send it. Serve has
no lock; a lock in the state folder serves the commands that share that folder.
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
from mhmoe_ray.cluster.dashboard import RetryingCaller
from mhmoe_ray.cluster.tokens import state_lock
from mhmoe_ray.errors import ServeError
from mhmoe_ray.ray_compat import SDK_LOGGERS

END_SECONDS = 150.0
"""Timeout for the shutdown of Serve; it allows for several requests, each of which waits up to 30 s."""


@functools.cache
def client(connection: Connection) -> Any:
    """Return Ray's own Serve client for a cluster; the client is cached."""
    # The import takes longer than everything else that `mhmoe status` does, so it is delayed until it is needed.
    from mhmoe_ray.ray_compat import ServeSubmissionClient

    logging.getLogger(SDK_LOGGERS[0]).setLevel(logging.WARNING)  # By default it logs every upload.
    return ServeSubmissionClient(connection.address, headers=connection.headers)


def serve_details(connection: Connection, seconds: float = 60) -> dict[str, Any]:
    """Return the state of Serve as its REST API reports it: `applications` by name, `http_options` and more.

    `seconds` is the timeout; the first answer takes longest, since the dashboard then joins the cluster.
    """
    path = "/api/serve/applications/"
    details: dict[str, Any] = dashboard.get(connection.address, path, connection.token, seconds=seconds)
    return details


def app_configs(details: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the configuration of each application in the state that `serve_details` returned.

    Applications that a program deployed by `serve.run` have none, and replacing the configurations does not affect
    them.
    """
    return [a["deployed_app_config"] for a in details["applications"].values() if a["deployed_app_config"]]


def config_lock(connection: Connection) -> AbstractContextManager[Path]:
    """Return the lock of a cluster's Serve configuration; a change holds it from its first request to its last."""
    cluster = "" if connection.local else f"-{hashlib.sha256(connection.address.encode()).hexdigest()[:8]}"
    return state_lock(f"serve{cluster}.lock")


def replace_config(
    connection: Connection, name: str, config: dict[str, Any] | None, retrying_caller: RetryingCaller
) -> None:
    """Replace the configuration of an application that still exists; None makes Serve remove the application."""
    with config_lock(connection):
        while (details := retrying_caller.call(functools.partial(serve_details, connection), None)) is None:
            time.sleep(0.2)
        other_configs = [c for c in app_configs(details) if c["name"] != name]
        if len(other_configs) < len(app_configs(details)):
            put_configs(connection, details, [*other_configs, *([config] if config else [])], details["http_options"])


def put_configs(
    connection: Connection, details: dict[str, Any], configs: list[dict[str, Any]], http: dict[str, Any]
) -> None:
    """Send Serve all configurations, keeping its proxy location and capacity; applications without one are removed."""
    config = {"applications": configs, "http_options": http}
    if details.get("proxy_location"):
        config["proxy_location"] = details["proxy_location"]
    if details.get("target_capacity") is not None:
        config["target_capacity"] = details["target_capacity"]
    client(connection).deploy_applications(config)


def shut_down_idle(connection: Connection) -> dict[str, Any]:
    """Shut Serve down if it has no applications, which frees its port; return the state of Serve afterwards.

    The caller must hold `config_lock`, because a Serve that was just started for a configuration has no applications
    yet. A Serve that does not end is a ServeError.
    """
    deadline = time.monotonic() + END_SECONDS
    while (details := serve_details(connection)).get("http_options") and not details["applications"]:
        if time.monotonic() > deadline:
            raise ServeError("Ray Serve", f"it does not shut down within {END_SECONDS:.0f} s", "see the dashboard")
        # The request is repeated, because Ray reports success even if Serve was too busy to receive the request or did
        # not end in time.
        client(connection).delete_applications()
        time.sleep(0.2)
    return details
