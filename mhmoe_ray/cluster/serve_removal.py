"""Removal of Ray Serve applications."""

import secrets
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from mhmoe_ray.cluster.connect import Connection
from mhmoe_ray.cluster.dashboard import Patience
from mhmoe_ray.cluster.jobs import explained
from mhmoe_ray.cluster.serve_client import changing, client, configs, end_idle, get, replace
from mhmoe_ray.errors import ServeError

SAY_SECONDS = 30.0
GIVE_UP_SECONDS = 60.0
"""Timeout in seconds for Serve to build an application and to give up its starting replicas.

It takes a few seconds unless the machine is busy or an environment is being installed.
"""

GRACE_SECONDS = 0
"""Graceful shutdown timeout in seconds of replicas that are not waited for."""


def remove(connection: Connection, name: str, say: Callable[[str], object] = lambda line: None) -> None:
    """Remove an application and wait until it is gone; with the last one Serve itself ends and frees its port.

    Replicas finish the requests they have begun, for as long as their deployment allows, and are waited for. Replicas
    that do not answer yet, because they load weights or no node has room for them, end at once.

    Args:
        connection: the cluster.
        name: the application's name.
        say: a function that is called with a line of progress now and then.

    Raises:
        ServeError: there is no such application, it was not deployed by a config, or it is deployed anew meanwhile.
        ClusterError, TokenError: the cluster does not answer, or wants another token.
    """
    what, patience = f"application {name}", Patience(say)
    details = get(connection)
    with explained(connection, what, ServeError, "see the dashboard"):
        if details["applications"]:
            _ask(connection, name, details, patience)
            _wait(connection, name, patience, say)
        elif not details.get("http_options"):
            raise ServeError(what, "there is no such application", "see `mhmoe serve status`")
        with changing(connection):
            end_idle(connection)


def _ask(connection: Connection, name: str, details: dict[str, Any], patience: Patience) -> None:
    what, told = f"application {name}", details["applications"].get(name)
    if told is None:
        raise ServeError(what, "there is no such application", "see `mhmoe serve status`")
    if told["status"] == "DELETING":
        return
    if told["source"] == "imperative" or not told["deployed_app_config"]:
        raise ServeError(what, "it was deployed by a program of its own", "call serve.delete there")
    try:
        _give_up_what_starts(connection, name, patience)
    finally:  # else it would stay as one that starts nowhere
        replace(connection, name, None, patience)


def _give_up_what_starts(connection: Connection, name: str, patience: Patience) -> None:
    """Make Serve give up the starting replicas of an application, and wait until it has.

    When Serve removes an application, it waits for starting replicas as long as for those that answer, which is ten
    minutes for ours. It does not wait for them if another version of the deployment takes their place. So this function
    deploys another version, which can start nowhere. Deployments with placement groups, which ours do not have, cannot
    be given other resources, so their replicas are waited for.
    """

    def until(done: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        deadline = time.monotonic() + GIVE_UP_SECONDS
        while True:
            told = patience.ask(partial(get, connection), None)
            found = told and told["applications"].get(name)
            if told and (not found or done(found) or time.monotonic() > deadline):
                return told
            time.sleep(0.2)

    client(connection)  # its import takes seconds, in which what we are told would grow old
    details = until(_is_built)  # whose deployments are not told before, and would start between two questions
    starting = [d for d, told in _deployments(details, name).items() if _starts_some(told)]
    config = next((c for c in configs(details) if c["name"] == name), {})
    deployments = {d["name"]: d for d in config.get("deployments", [])}
    nowhere = _nowhere()
    given_up = {d: {"name": d, **deployments.get(d, {}), **nowhere} for d in starting}
    if given_up and not any("placement_group_bundles" in d for d in given_up.values()):
        config = {**config, "deployments": list({**deployments, **given_up}.values())}
        replace(connection, name, config, patience)
        until(lambda application: _gave_up(application, starting))


def _nowhere() -> dict[str, Any]:
    """Return options of a deployment whose replicas find no node and are not waited for.

    They differ for each removal, so that Serve also replaces replicas that another removal left without a node, which
    look like any other replicas that start.
    """
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


def _starts_some(deployment: dict[str, Any]) -> bool:
    """Return whether a deployment starts replicas now or will do so next.

    A deployment may already run its target number of replicas while it starts others, if the running ones are of a
    version that is to be replaced.
    """
    states = [replica["state"] for replica in deployment["replicas"]]
    return "STARTING" in states or states.count("RUNNING") < deployment["target_num_replicas"]


def _gave_up(application: dict[str, Any], starting: list[str]) -> bool:
    """Return whether Serve has taken the new version as the target of these deployments and stopped older replicas.

    Older replicas are those that started before the last deployment and are still starting; both times are by Serve's
    clock. If Serve starts an older replica in between, it stops that replica before it looks at applications again.
    """
    for told in (application["deployments"][d] for d in starting if d in application["deployments"]):
        replicas = [r for r in told["replicas"] if r["start_time_s"] < application["last_deployed_time_s"]]
        timeout = told["deployment_config"]["graceful_shutdown_timeout_s"]
        if timeout != GRACE_SECONDS or any(r["state"] == "STARTING" for r in replicas):
            return False
    return True


def _wait(connection: Connection, name: str, patience: Patience, say: Callable[[str], object]) -> None:
    """Wait, without a timeout, until an application is gone, which Serve ensures in the end.

    Raises:
        ServeError: the application is deployed anew meanwhile.
    """
    began = said = time.monotonic()
    while (told := patience.ask(partial(get, connection), None)) is None or name in told["applications"]:
        if told and told["applications"][name]["status"] != "DELETING":
            raise ServeError(f"application {name}", "it is deployed anew meanwhile", "see `mhmoe serve status`")
        now = time.monotonic()
        if now - said > SAY_SECONDS:
            say(f"application {name} ends what it has begun, for {now - began:.0f} s so far")
            said = now
        time.sleep(0.5)
