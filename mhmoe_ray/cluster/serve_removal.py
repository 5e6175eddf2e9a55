"""Removal of Ray Serve applications, including those whose replicas are still starting."""

import secrets
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from mhmoe_ray.cluster.connect import Connection
from mhmoe_ray.cluster.dashboard import RetryingCaller
from mhmoe_ray.cluster.jobs import translated_errors
from mhmoe_ray.cluster.serve_client import (
    app_configs,
    client,
    config_lock,
    replace_config,
    serve_details,
    shut_down_idle,
)
from mhmoe_ray.errors import ServeError
from mhmoe_ray.terminal import Activity

CANCEL_SECONDS = 60.0
"""Timeout for Serve to build an application, and again to cancel starting replicas; both usually take seconds."""

GRACE_SECONDS = 0
"""Graceful shutdown timeout in seconds of replicas that Serve has to end at once."""


def remove(connection: Connection, name: str, say: Callable[[str], object] = lambda line: None) -> None:
    """Remove an application and wait until it is gone; with the last application, Serve shuts down and frees its port.

    Running replicas finish their requests within the time that their deployment allows; starting ones end at once. An
    interrupted removal can leave Serve running without any application; then Serve is shut down, regardless of `name`.
    An application that is missing, was deployed by a program, or is deployed again meanwhile is a ServeError.
    """
    subject, retrying_caller = f"application {name}", RetryingCaller(say)
    details = serve_details(connection)
    with translated_errors(connection, subject, ServeError, "see the dashboard"):
        if details["applications"]:
            _request_removal(connection, name, details, retrying_caller)
            _wait_until_removed(connection, name, retrying_caller, say)
        elif not details.get("http_options"):
            raise ServeError(subject, "there is no such application", "see `mhmoe serve status`")
        with config_lock(connection):
            shut_down_idle(connection)


def _request_removal(
    connection: Connection, name: str, details: dict[str, Any], retrying_caller: RetryingCaller
) -> None:
    subject, application = f"application {name}", details["applications"].get(name)
    if application is None:
        raise ServeError(subject, "there is no such application", "see `mhmoe serve status`")
    if application["status"] == "DELETING":
        return
    if application["source"] == "imperative" or not application["deployed_app_config"]:
        raise ServeError(subject, "a program deployed it by serve.run", "call serve.delete there")
    try:
        _cancel_starting_replicas(connection, name, retrying_caller)
    finally:
        # Remove the application even after an error, because by then it may be deployed in a version that no node can
        # run.
        replace_config(connection, name, None, retrying_caller)


def _cancel_starting_replicas(connection: Connection, name: str, retrying_caller: RetryingCaller) -> None:
    """Make Serve cancel the starting replicas of an application, and wait for that up to `CANCEL_SECONDS`.

    A removal grants starting replicas the same time to end as running ones, ten minutes for our applications. Serve
    ends them at once only if another version of their deployment replaces them, so this deploys a version that no node
    can run. It deploys nothing if one of the deployments has placement groups, whose resources cannot be changed; ours
    have none.
    """

    def wait_until(is_done: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        deadline = time.monotonic() + CANCEL_SECONDS
        while True:
            details = retrying_caller.call(partial(serve_details, connection), None)
            application = details and details["applications"].get(name)
            if details and (not application or is_done(application) or time.monotonic() > deadline):
                return details
            time.sleep(0.2)

    # `client` imports Ray's Serve client, which takes seconds. It is called before the first request, because otherwise
    # the answer to that request would be outdated when it is used.
    client(connection)
    # Wait until Serve has built the application. Before that Serve reports no deployments, and it could start replicas
    # between two of our requests.
    details = wait_until(_is_built)
    starting = [d for d, deployment in _deployments(details, name).items() if _has_starting_replicas(deployment)]
    config = next((c for c in app_configs(details) if c["name"] == name), {})
    deployments = {d["name"]: d for d in config.get("deployments", [])}
    unplaceable = _unplaceable_options()
    unplaceable_deployments = {d: {"name": d, **deployments.get(d, {}), **unplaceable} for d in starting}
    if unplaceable_deployments and not any("placement_group_bundles" in d for d in unplaceable_deployments.values()):
        config = {**config, "deployments": list({**deployments, **unplaceable_deployments}.values())}
        replace_config(connection, name, config, retrying_caller)
        wait_until(lambda application: _has_cancelled(application, starting))


def _unplaceable_options() -> dict[str, Any]:
    """Return options of a deployment whose replicas no node can run and which Serve ends at once."""
    # The replicas demand a resource that no node has. Its name is new for each removal, because with an old name, left
    # by an interrupted removal, Serve would see no change in the deployment and would not replace its replicas.
    resource = f"none_as_it_is_removed_{secrets.token_hex(4)}"
    return {
        "graceful_shutdown_timeout_s": GRACE_SECONDS,
        "max_surge_percent": 100,
        "ray_actor_options": {"num_cpus": 0, "num_gpus": 0, "resources": {resource: 1}},
    }


def _deployments(details: dict[str, Any], name: str) -> dict[str, Any]:
    deployments: dict[str, Any] = details["applications"].get(name, {}).get("deployments", {})
    return deployments


def _is_built(application: dict[str, Any]) -> bool:
    return bool(application["status"] != "DEPLOYING" or application["deployments"])


def _has_starting_replicas(deployment: dict[str, Any]) -> bool:
    """Return whether replicas start now or next; an update starts new ones beside the target number of old ones."""
    states = [replica["state"] for replica in deployment["replicas"]]
    return "STARTING" in states or states.count("RUNNING") < deployment["target_num_replicas"]


def _has_cancelled(application: dict[str, Any], starting: list[str]) -> bool:
    """Return whether Serve has deployed `_unplaceable_options` and cancelled all replicas that were starting before."""
    # Both times are by Serve's clock, so they can be compared. Replicas of the older version that start after the last
    # deployment need no check, because Serve stops them before it reports applications again.
    for deployment in (application["deployments"][d] for d in starting if d in application["deployments"]):
        replicas = [r for r in deployment["replicas"] if r["start_time_s"] < application["last_deployed_time_s"]]
        timeout = deployment["deployment_config"]["graceful_shutdown_timeout_s"]
        if timeout != GRACE_SECONDS or any(r["state"] == "STARTING" for r in replicas):
            return False
    return True


def _wait_until_removed(
    connection: Connection, name: str, retrying_caller: RetryingCaller, say: Callable[[str], object]
) -> None:
    """Wait without a timeout, as Serve kills replicas that exceed theirs; a new deployment is a ServeError."""
    say(Activity("waiting", f"until application {name} finishes its requests"))
    while (details := retrying_caller.call(partial(serve_details, connection), None)) is None or name in details[
        "applications"
    ]:
        if details and details["applications"][name]["status"] != "DELETING":
            raise ServeError(f"application {name}", "it was deployed again meanwhile", "see `mhmoe serve status`")
        time.sleep(0.5)
