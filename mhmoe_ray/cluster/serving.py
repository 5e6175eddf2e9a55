"""Ray Serve applications: deploy and inspect them."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from mhmoe_ray.cluster import dashboard
from mhmoe_ray.cluster.connect import Connection
from mhmoe_ray.cluster.dashboard import Patience
from mhmoe_ray.cluster.jobs import NEVER, PACKAGES, check_size, explained, reason, with_packages
from mhmoe_ray.cluster.serve_client import changing, client, configs, end_idle, get, put
from mhmoe_ray.errors import ServeError, SpecError
from mhmoe_ray.serve.config import IMPORT_PATH

SAY_SECONDS = 30.0
"""Seconds between two lines about an application that does not answer yet."""


@dataclass(frozen=True)
class Application:
    name: str
    url: str
    """URL at which the application answers."""
    reachable: bool
    """Whether this machine can reach the URL.

    It cannot if the URL is a loopback address of another machine: here it would lead to whatever listens on this
    machine.
    """
    status: str
    """One of NOT_STARTED, DEPLOYING, RUNNING, DEPLOY_FAILED, UNHEALTHY and DELETING."""
    message: str
    """Message in one line; empty if all is well."""
    checkpoint: str | None
    """Path of the checkpoint that the application serves; None if the application is not one of ours."""


def deploy(connection: Connection, application: dict[str, Any], host: str, port: int) -> str:
    """Add an application to those that Serve runs, or replace the one of its name; return its future URL.

    It does not wait until the application answers at that URL.

    Args:
        connection: the cluster.
        application: the configuration as in Serve's config file: name, route_prefix, import_path, args, runtime_env ...
            Folders and files of this machine that runtime_env names are sent; to a cluster that this package did not
            start, our packages are sent as well.
        host: the address that Serve's proxies listen on.
        port: the port that they listen on.

    Raises:
        ServeError: Serve does not accept the application, cannot listen there, or listens elsewhere already.
        SpecError: the runtime environment is not one that Ray knows, or sends more than Ray takes.
    """
    what = f"application {application['name']}"
    with explained(connection, what, ServeError, f"correct it, or its address {host}:{port}"):
        serve = client(connection)
        with changing(connection):
            _checked(connection, application, host, port)
        runtime_env = application.get("runtime_env", {})
        sent = _sent(serve, runtime_env if connection.local else with_packages(runtime_env))
        application = {**application, "runtime_env": sent}
        with changing(connection):
            # To send takes its time, in which others may have deployed or removed theirs.
            details = _checked(connection, application, host, port)
            others = [a for a in configs(details) if a["name"] != application["name"]]
            try:
                put(connection, details, [*others, application], {"host": host, "port": port})
            except RuntimeError:
                end_idle(connection)
                raise
    route: str = application.get("route_prefix", "/")
    return _place(connection, host, port)[0] + route.rstrip("/")


def _checked(connection: Connection, application: dict[str, Any], host: str, port: int) -> dict[str, Any]:
    """Return Serve's details, after a check that the application's address and route fit what Serve runs.

    Raises:
        ServeError: Serve listens elsewhere, or another application answers at that route.
    """
    details = end_idle(connection)  # without applications it keeps its port, also one that it could not get
    _check_address(details, host, port)
    _check_route(details, application)
    return details


def _sent(serve: Any, runtime_env: dict[str, Any]) -> dict[str, Any]:
    """Upload what a runtime environment names on this machine, and return it in the form that Serve takes.

    Folders are replaced by URIs, which Serve insists on, and requirements files are read.

    Raises:
        SpecError: Ray does not accept the runtime environment.
    """
    from ray.runtime_env import RuntimeEnv

    check_size(runtime_env)
    runtime_env = dict(runtime_env)
    try:
        serve._upload_working_dir_if_needed(runtime_env)
        serve._upload_py_modules_if_needed(runtime_env)
        return dict(RuntimeEnv(**runtime_env).to_dict())
    except (ValueError, TypeError) as e:
        raise SpecError("cluster.runtime_env", reason(str(e)), "correct it in the spec") from e


def without_packages(runtime_env: dict[str, Any]) -> dict[str, Any]:
    """Return a deployed runtime environment as it was before our packages were added to it and uploaded.

    Our packages are URIs by now, the last ones of those that were uploaded, and would take precedence over newer
    packages.
    """
    modules = runtime_env.get("py_modules", [])
    ours = [module for module in modules if module.startswith("gcs://")][-len(PACKAGES) :]
    before = {"py_modules": [module for module in modules if module not in ours]}
    before |= {"excludes": [pattern for pattern in runtime_env.get("excludes", []) if pattern not in NEVER]}
    return {key: value for key, value in {**runtime_env, **before}.items() if value}


def wait_until_running(
    connection: Connection, name: str, timeout: float = math.inf, say: Callable[[str], object] = lambda line: None
) -> Application:
    """Wait until an application answers, and return it.

    By default there is no timeout, because starting a node and pulling its image take time, and Serve itself reports
    when it gives up.

    Args:
        connection: the cluster.
        name: the application's name.
        timeout: the timeout in seconds.
        say: a function that is called with a line of progress now and then.

    Raises:
        ServeError: the application failed, is gone, or does not run in time; the reason is what Serve says about it.
        ClusterError, TokenError: the cluster gave no answer for too long, or wants another token.
    """
    what, patience = f"application {name}", Patience(say)
    began = said = time.monotonic()
    while True:
        application = patience.ask(lambda: _application(connection, name), None)
        if application and application.status == "RUNNING":
            return application
        if application and application.status == "DEPLOY_FAILED":
            raise ServeError(what, application.message, "see its log in the dashboard")
        now = time.monotonic()
        if application and now - began > timeout:
            why = f"not running after {timeout:.0f} s: {application.message or application.status}"
            raise ServeError(what, why, "wait, or check that the cluster has the CPUs and GPUs for it")
        if application and now - said > SAY_SECONDS:
            message = f": {application.message}" if application.message else ""
            say(f"{what} is {application.status} for {now - began:.0f} s{message}")
            said = now
        time.sleep(0.5)


def _application(connection: Connection, name: str) -> Application:
    found = next((a for a in applications(connection) if a.name == name), None)
    if found is None:
        raise ServeError(f"application {name}", "it is gone from the cluster", "deploy it again")
    return found


def applications(connection: Connection, seconds: float = 60) -> list[Application]:
    """Return all applications that Serve runs on the cluster, sorted by name.

    Args:
        connection: the cluster.
        seconds: the timeout of the answer; for the first one the dashboard joins the Ray cluster.

    Raises:
        ClusterError, TokenError: in the same cases as `dashboard.get`.
    """
    details = get(connection, seconds)
    http = details.get("http_options") or {}
    base, reachable = _place(connection, str(http.get("host")), int(http.get("port") or 0))
    found = []
    for name, app in sorted(details["applications"].items()):
        url = base + (_route(app) or "").rstrip("/")
        config = app["deployed_app_config"]
        checkpoint = config["args"]["checkpoint"] if config and _is_ours(config) else None
        found.append(Application(name, url, reachable, app["status"], _message(app), checkpoint))
    return found


def _place(connection: Connection, host: str, port: int) -> tuple[str, bool]:
    """Return Serve's URL, and whether it leads there from this machine.

    Serve's proxies listen on the head node too, where the dashboard is, unless the dashboard is reached through a
    tunnel.
    """
    if host in ("0.0.0.0", "::") and not connection.is_local_machine:
        host = urlsplit(connection.address).hostname or host
    url = dashboard.url_at(host, port)
    return url, connection.is_local_machine or not dashboard.is_loopback(url)


def _is_ours(config: dict[str, Any]) -> bool:
    return bool(config["import_path"] == IMPORT_PATH)


def _check_address(details: dict[str, Any], host: str, port: int) -> None:
    """Check that Serve does not listen on another host or port.

    While it runs, Serve silently ignores a configuration with another one.

    Raises:
        ServeError: Serve listens elsewhere.
    """
    http = details.get("http_options")
    if http and (http["host"], http["port"]) != (host, port):
        why = f"Serve listens on {http['host']}:{http['port']} already and has one address for all applications"
        raise ServeError(f"address {host}:{port}", why, "use that one, or remove the other applications first")


def _check_route(details: dict[str, Any], application: dict[str, Any]) -> None:
    route = application.get("route_prefix", "/")
    for name, app in details["applications"].items():
        if _route(app) == route and name != application["name"]:
            what, why = f"application {application['name']}", f"{name} answers at {route} already"
            raise ServeError(what, why, f"take another route, or remove {name}")


def _route(app: dict[str, Any]) -> str | None:
    """Return the route prefix of an application; None if it has none.

    Serve itself reports none for an application that it is still building, so it is taken from the configuration then.
    """
    route: str | None = app["route_prefix"] or (app["deployed_app_config"] or {}).get("route_prefix")
    return route


def _message(app: dict[str, Any]) -> str:
    """Return the message of an application in one line; empty if it is running or has none.

    The first message of a deployment comes before the application's own, which only names the deployment.
    """
    if app["status"] == "RUNNING":
        return ""
    texts = [*(d["message"] for d in app["deployments"].values()), app["message"]]
    return next((reason(t) for t in texts if t), "")


def declared(connection: Connection, name: str) -> tuple[dict[str, Any], str, int]:
    """Return the configuration of one of our applications, and Serve's host and port.

    It is the one that was given to `deploy`, except for folders, which were uploaded and are URIs now.

    Raises:
        ServeError: there is no such application, or it is not one of ours.
        ClusterError, TokenError: in the same cases as `dashboard.get`.
    """
    what, details = f"application {name}", get(connection)
    found = next((config for config in configs(details) if config["name"] == name), None)
    if found is None:
        raise ServeError(what, "there is no such application", "see `mhmoe serve status`")
    if not _is_ours(found):
        raise ServeError(what, "it serves no checkpoint of a run", "update it by what deployed it")
    if not connection.local:
        found["runtime_env"] = without_packages(found.get("runtime_env", {}))
    return found, details["http_options"]["host"], details["http_options"]["port"]


def stats(application: Application, key: str | None) -> dict[str, Any] | str:
    """Return the statistics of one of our applications about its replicas, or a sentence why there are none.

    No request is sent to an application that is out of reach, so that no key reaches a server that listens here
    instead.

    Args:
        application: the application.
        key: its API key; None to send no key.
    """
    import requests  # takes longer to import than all else here

    url = application.url
    if not application.reachable:
        return f"{url} is of the cluster's own machine; ask it there, or forward its port"
    dashboard.keep_off_proxies(url)
    try:
        answer = requests.get(f"{url}/stats", headers={"Authorization": f"Bearer {key}"} if key else {}, timeout=10)
        if answer.status_code == 401:
            return "it has keys; give one in MHMOE_API_KEY"
        answer.raise_for_status()
        told: dict[str, Any] = answer.json()
        return told
    except requests.RequestException as e:
        return f"{url}/stats: {e}"
