"""Client of the Serve configuration, which is one for all applications, over the dashboard's REST API.

A change replaces the whole configuration, so it must read the current one first, and nobody else may change it in
between. For commands that share a state folder a lock ensures that; Serve itself has no lock.
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
"""Timeout in seconds for Serve to end: several times the half minute that one request to end it waits."""


@functools.cache
def client(connection: Connection) -> Any:
    """Return Ray's own Serve client, which takes longer to import than everything else that `mhmoe status` does."""
    from mhmoe_ray.ray_compat import ServeSubmissionClient

    logging.getLogger(SDK_LOGGERS[0]).setLevel(logging.WARNING)  # it tells of every upload
    return ServeSubmissionClient(connection.address, headers=connection.headers)


def get(connection: Connection, seconds: float = 60) -> dict[str, Any]:
    """Return Serve's details of itself: `applications` by name, `http_options` and more.

    Args:
        connection: the cluster.
        seconds: the timeout of the answer; for the first one the dashboard joins the Ray cluster.

    Raises:
        ClusterError, TokenError: in the same cases as `dashboard.get`.
    """
    path = "/api/serve/applications/"
    details: dict[str, Any] = dashboard.get(connection.address, path, connection.token, seconds=seconds)
    return details


def configs(details: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the configurations in force, from Serve's details.

    Applications of `serve.run` have no configuration and stay, whatever configuration is put.
    """
    return [a["deployed_app_config"] for a in details["applications"].values() if a["deployed_app_config"]]


def changing(connection: Connection) -> AbstractContextManager[Path]:
    """Return the lock of a cluster's Serve configuration.

    Hold it from the request that reads the configuration until the changed one is put.
    """
    cluster = "" if connection.local else f"-{hashlib.sha256(connection.address.encode()).hexdigest()[:8]}"
    return locked(f"serve{cluster}.lock")


def replace(connection: Connection, name: str, config: dict[str, Any] | None, patience: Patience) -> None:
    """Replace the configuration of an application, or remove it if `config` is None, so that Serve removes the
    application.

    An application that is gone is left alone.

    Raises:
        ClusterError, TokenError: in the same cases as `Patience.ask`.
    """
    with changing(connection):
        while (details := patience.ask(functools.partial(get, connection), None)) is None:
            time.sleep(0.2)
        others = [c for c in configs(details) if c["name"] != name]
        if len(others) < len(configs(details)):
            put(connection, details, [*others, *([config] if config else [])], details["http_options"])


def put(connection: Connection, details: dict[str, Any], configs: list[dict[str, Any]], http: dict[str, Any]) -> None:
    """Put the configurations of all applications that are to stay; Serve removes those that are missing.

    Args:
        connection: the cluster.
        details: Serve's current details, whose proxy location and target capacity are kept.
        configs: the configurations of the applications.
        http: Serve's host and port.
    """
    config = {"applications": configs, "http_options": http}
    if details.get("proxy_location"):
        config["proxy_location"] = details["proxy_location"]
    if details.get("target_capacity") is not None:
        config["target_capacity"] = details["target_capacity"]
    client(connection).deploy_applications(config)


def end_idle(connection: Connection) -> dict[str, Any]:
    """End Serve itself, which frees its port, unless it has applications.

    Call it under the lock of `changing`: a Serve that was just started for a configuration has no applications yet.

    Returns:
        Serve's details afterwards.

    Raises:
        ServeError: Serve does not end.
        ClusterError, TokenError: in the same cases as `dashboard.get`.
    """
    deadline = time.monotonic() + END_SECONDS
    while (details := get(connection)).get("http_options") and not details["applications"]:
        if time.monotonic() > deadline:
            raise ServeError("Ray Serve", f"it does not end within {END_SECONDS:.0f} s", "see the dashboard")
        # That is said to be done, too, where Serve was too busy to hear of it, or had not ended in time.
        client(connection).delete_applications()
        time.sleep(0.2)
    return details
