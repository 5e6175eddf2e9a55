"""Ray Serve applications: deploy and look at them."""

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
"""Between two lines on an application that does not answer yet."""


@dataclass(frozen=True)
class Application:
    name: str
    url: str
    """Where it answers."""
    reachable: bool
    """False where that is a loopback address of another machine: from here it leads to whatever listens here."""
    status: str
    """NOT_STARTED, DEPLOYING, RUNNING, DEPLOY_FAILED, UNHEALTHY or DELETING."""
    message: str
    """One line; empty if all is well."""
    checkpoint: str | None
    """What it serves; None if it is not one of ours."""


def deploy(connection: Connection, application: dict[str, Any], host: str, port: int) -> str:
    """Add an application to what Serve runs, or replace the one of its name. Returns before it answers: the URL at
    which it will.

    Args:
        connection: the cluster.
        application: as in Serve's config file: name, route_prefix, import_path, args, runtime_env ... Folders and files
            of this machine that the last one names are sent, and to a cluster that is not ours our packages.
        host: address that Serve's proxies listen on.
        port: their port.

    Raises:
        ServeError: Serve does not accept it, cannot listen there, or listens elsewhere already.
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
    """What Serve tells, if the application can be had there beside what it runs."""
    details = end_idle(connection)  # without applications it keeps its port, also one that it could not get
    _check_address(details, host, port)
    _check_route(details, application)
    return details


def _sent(serve: Any, runtime_env: dict[str, Any]) -> dict[str, Any]:
    """With URIs, which Serve insists on, in place of this machine's folders, and files of requirements read."""
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
    """As it was before our packages were added to it and sent: they are URIs now, the last ones of those that were
    sent, and would stand before what is newer."""
    modules = runtime_env.get("py_modules", [])
    ours = [module for module in modules if module.startswith("gcs://")][-len(PACKAGES) :]
    before = {"py_modules": [module for module in modules if module not in ours]}
    before |= {"excludes": [pattern for pattern in runtime_env.get("excludes", []) if pattern not in NEVER]}
    return {key: value for key, value in {**runtime_env, **before}.items() if value}


def wait_until_running(
    connection: Connection, name: str, timeout: float = math.inf, say: Callable[[str], object] = lambda line: None
) -> Application:
    """The application, when it answers. By default it is waited for as long as Serve is at it, which says so when it
    gives up: a node that must start, and its image, take their time.

    Args:
        connection: the cluster.
        name: the application's.
        timeout: in seconds.
        say: takes a line now and then.

    Raises:
        ServeError: it failed, is gone, or is not up in time; with what Serve says about it.
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
    """All that Serve runs on the cluster, by name.

    Args:
        connection: the cluster.
        seconds: that an answer may take; the dashboard joins Ray for the first.

    Raises:
        ClusterError, TokenError: as `dashboard.get`.
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
    """Serve's URL, and whether it leads there from here. Its proxies listen on the head too, where the dashboard is,
    unless that is seen through a tunnel."""
    if host in ("0.0.0.0", "::") and not connection.is_local_machine:
        host = urlsplit(connection.address).hostname or host
    url = dashboard.url_at(host, port)
    return url, connection.is_local_machine or not dashboard.is_loopback(url)


def _is_ours(config: dict[str, Any]) -> bool:
    return bool(config["import_path"] == IMPORT_PATH)


def _check_address(details: dict[str, Any], host: str, port: int) -> None:
    """While Serve runs, it ignores another host or port without a word."""
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
    """Serve itself tells none of an application that it still builds."""
    route: str | None = app["route_prefix"] or (app["deployed_app_config"] or {}).get("route_prefix")
    return route


def _message(app: dict[str, Any]) -> str:
    """That of the first deployment that has one, since the application's own then only names the deployment."""
    if app["status"] == "RUNNING":
        return ""
    texts = [*(d["message"] for d in app["deployments"].values()), app["message"]]
    return next((reason(t) for t in texts if t), "")


def declared(connection: Connection, name: str) -> tuple[dict[str, Any], str, int]:
    """The configuration of an application of ours as it was given to `deploy`, but for folders that were sent, and
    Serve's host and port.

    Raises:
        ServeError: there is no such application, or it is not one of ours.
        ClusterError, TokenError: as `dashboard.get`.
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
    """What an application of ours tells of its replicas, or why it does not. One out of reach is not asked: whoever
    listens here instead is to get no key."""
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
