"""Ray's client for the configuration of Serve, which is one for all applications, over the dashboard's REST API."""

import functools
import logging
from typing import Any

from mhmoe_ray.cluster.connect import Connection


@functools.cache
def client(connection: Connection) -> Any:
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

    logging.getLogger("ray.dashboard.modules.dashboard_sdk").setLevel(logging.WARNING)  # it tells of every upload
    return ServeSubmissionClient(connection.address, headers=connection.headers)


def configs(details: dict[str, Any]) -> list[dict[str, Any]]:
    """Those in force. Applications of `serve.run` have none and stay whatever we put."""
    return [a["deployed_app_config"] for a in details["applications"].values() if a["deployed_app_config"]]


def put(connection: Connection, details: dict[str, Any], configs: list[dict[str, Any]], http: dict[str, Any]) -> None:
    """Serve's PUT replaces the whole configuration, so it must hold all that is to stay."""
    config = {"applications": configs, "http_options": http}
    if details.get("proxy_location"):
        config["proxy_location"] = details["proxy_location"]
    if details.get("target_capacity") is not None:
        config["target_capacity"] = details["target_capacity"]
    client(connection).deploy_applications(config)
