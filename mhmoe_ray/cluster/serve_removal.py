"""Take Ray Serve applications away."""

import time
from collections.abc import Callable
from typing import Any

from mhmoe_ray.cluster.connect import Connection
from mhmoe_ray.cluster.http_errors import explained
from mhmoe_ray.cluster.patience import Patience
from mhmoe_ray.cluster.serve_client import client, configs, put
from mhmoe_ray.errors import ServeError

SPARE_SECONDS = 120.0
"""For what Serve does beside waiting for replicas, on a busy machine."""
SAY_SECONDS = 30.0

NOWHERE = {
    "graceful_shutdown_timeout_s": 0,
    "max_surge_percent": 100,
    "ray_actor_options": {"num_cpus": 0, "num_gpus": 0, "resources": {"none_as_it_is_removed": 1}},
}
"""Options of a deployment whose replicas find no place, and are not waited for."""


def remove(connection: Connection, name: str, say: Callable[[str], object] = lambda line: None) -> None:
    """Take an application away and wait until it is gone; with the last one Serve itself ends and frees its port.

    Replicas end what they have begun, for as long as their deployment allows. Those that have not begun to answer,
    since they load weights or no node has room for them, end at once.

    Args:
        connection: the cluster.
        name: the application's.
        say: takes a line now and then.

    Raises:
        ServeError: there is no such application, it was not deployed by a config, or it does not go away.
        ClusterError, TokenError: the cluster does not answer, or wants another token.
    """
    what = f"application {name}"
    with explained(connection, what, ServeError, "see the dashboard"):
        details = _told(connection, what)
        seconds = _seconds(details, name)
        if _status(details, name) != "DELETING":
            if name not in {config["name"] for config in configs(details)}:
                raise ServeError(what, "there is no such application", "see `mhmoe serve status`")
            details = _without_what_starts(connection, name, details)
            put(connection, details, [c for c in configs(details) if c["name"] != name], details["http_options"])
        patience = Patience(say)
        began = said = time.monotonic()
        while name in (details := patience.ask(lambda: _told(connection, what), details))["applications"]:
            now = time.monotonic()
            if now - began > seconds + SPARE_SECONDS:
                raise ServeError(what, f"it is still there after {now - began:.0f} s", "see the dashboard")
            if now - said > SAY_SECONDS:
                say(f"{what} ends what it has begun, for at most {seconds:.0f} s, whether or not this command waits")
                said = now
            time.sleep(0.5)
        if not details["applications"]:
            client(connection).delete_applications()


def _told(connection: Connection, what: str) -> dict[str, Any]:
    with explained(connection, what, ServeError, "see the dashboard"):
        details: dict[str, Any] = client(connection).get_serve_details()
        return details


def _without_what_starts(connection: Connection, name: str, details: dict[str, Any]) -> dict[str, Any]:
    """What Serve tells once no replica of the application starts any more.

    When it removes an application, Serve waits for those that start as for those that answer, ours ten minutes. It does
    not where another version takes their place; so one does, which starts nowhere. Deployments with placement groups,
    which ours have not, take no other resources, and are waited for.
    """
    starting = _starting(details, name)
    others = [c for c in configs(details) if c["name"] != name]
    [config] = [c for c in configs(details) if c["name"] == name]
    deployments = {d["name"]: d for d in config.get("deployments", [])}
    given_up = {d: {"name": d, **deployments.get(d, {}), **NOWHERE} for d, _ in starting}
    if not given_up or any("placement_group_bundles" in d for d in given_up.values()):
        return details
    config = {**config, "deployments": list({**deployments, **given_up}.values())}
    put(connection, details, [*others, config], details["http_options"])
    deadline = time.monotonic() + SPARE_SECONDS
    while starting & _starting(details, name) and time.monotonic() < deadline:
        time.sleep(0.2)
        details = client(connection).get_serve_details()
        if _status(details, name) != "DEPLOYING":  # where it is the code that asks for placement groups
            break
    return details


def _status(details: dict[str, Any], name: str) -> str | None:
    status: str | None = details["applications"].get(name, {}).get("status")
    return status


def _deployments(details: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = details["applications"].get(name, {}).get("deployments", {})
    return found


def _starting(details: dict[str, Any], name: str) -> set[tuple[str, str]]:
    """Deployments and replicas."""
    return {
        (deployment, replica["replica_id"])
        for deployment, told in _deployments(details, name).items()
        for replica in told["replicas"]
        if replica["state"] == "STARTING"
    }


def _seconds(details: dict[str, Any], name: str) -> float:
    """Seconds for which a replica may go on."""
    told = _deployments(details, name).values()
    return max((d["deployment_config"]["graceful_shutdown_timeout_s"] for d in told), default=0.0)
