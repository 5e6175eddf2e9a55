"""Ray Serve applications: deploy and inspect them. A cluster that does not answer is a ClusterError."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from mhmoe_ray.cluster import dashboard
from mhmoe_ray.cluster.connect import Connection
from mhmoe_ray.cluster.dashboard import RetryingCaller
from mhmoe_ray.cluster.jobs import failure_reason, translated_errors, upload_runtime_env
from mhmoe_ray.cluster.packages import EXCLUDED_PATTERNS, PACKAGES, with_packages
from mhmoe_ray.cluster.serve_client import app_configs, client, config_lock, put_configs, serve_details, shut_down_idle
from mhmoe_ray.errors import ServeError
from mhmoe_ray.serving.config import IMPORT_PATH, adapter_paths
from mhmoe_ray.spec.serve import is_valid_key
from mhmoe_ray.terminal import Activity


@dataclass(frozen=True)
class Application:
    """State of a Ray Serve application."""

    name: str
    url: str
    reachable: bool
    """Whether this machine can reach the URL; another machine's loopback address would lead to a server of this one."""
    status: str
    """One of NOT_STARTED, DEPLOYING, RUNNING, DEPLOY_FAILED, UNHEALTHY and DELETING."""
    message: str
    """Serve's message as one line; empty if all is well."""
    checkpoint: str | None
    """Path of the served checkpoint; None if this package did not deploy the application."""
    adapters: dict[str, str]
    """Paths of the checkpoints of its adapters, by their names."""

    @property
    def checkpoints(self) -> dict[str, str]:
        """Paths of all checkpoints that it serves, by its name and NAME/ADAPTER."""
        paths = {self.name: self.checkpoint} if self.checkpoint else {}
        return paths | {f"{self.name}/{adapter}": path for adapter, path in self.adapters.items()}


def deploy(connection: Connection, application: dict[str, Any], host: str, port: int) -> str:
    """Add an application to those that Serve runs, or replace the one of the same name; return its URL without waiting.

    `application` is a configuration as in Serve's config file. Folders and files of this machine that its runtime_env
    names are uploaded, as are our packages to a cluster that this package did not start. If Serve refuses the
    application or cannot take this address, it is a ServeError; a wrong or too large runtime environment is a
    SpecError.
    """
    subject = f"application {application['name']}"
    with translated_errors(connection, subject, ServeError, f"correct it, or its address {host}:{port}"):
        serve = client(connection)
        with config_lock(connection):
            _checked_details(connection, application, host, port)
        runtime_env = application.get("runtime_env", {})
        uploaded_env = upload_runtime_env(serve, runtime_env if connection.local else with_packages(runtime_env))
        application = {**application, "runtime_env": uploaded_env}
        with config_lock(connection):
            # Request the details again, because others may have deployed or removed applications during the upload,
            # which takes its time.
            details = _checked_details(connection, application, host, port)
            other_configs = [a for a in app_configs(details) if a["name"] != application["name"]]
            try:
                put_configs(connection, details, [*other_configs, application], {"host": host, "port": port})
            except RuntimeError:
                shut_down_idle(connection)
                raise
    route: str = application.get("route_prefix", "/")
    return _public_url(connection, host, port)[0] + route.rstrip("/")


def _checked_details(connection: Connection, application: dict[str, Any], host: str, port: int) -> dict[str, Any]:
    """Return the state of Serve; an application whose address or route does not fit it is a ServeError."""
    # Shut Serve down if it has no applications. If it stayed up, it would keep its address, even one that it failed to
    # listen on, and the new address would be refused.
    details = shut_down_idle(connection)
    _check_address(details, host, port)
    _check_route(details, application)
    return details


def without_packages(runtime_env: dict[str, Any]) -> dict[str, Any]:
    """Return a deployed runtime environment without our packages, as it was before `deploy` added them."""
    # Our packages are the last of the uploaded URIs. They are taken out, because otherwise they would take precedence
    # over the newer packages of the next deployment.
    modules = runtime_env.get("py_modules", [])
    our_modules = [module for module in modules if module.startswith("gcs://")][-len(PACKAGES) :]
    original_keys = {"py_modules": [module for module in modules if module not in our_modules]}
    original_keys |= {
        "excludes": [pattern for pattern in runtime_env.get("excludes", []) if pattern not in EXCLUDED_PATTERNS]
    }
    return {key: value for key, value in {**runtime_env, **original_keys}.items() if value}


def wait_until_running(
    connection: Connection, name: str, timeout: float = math.inf, say: Callable[[str], object] = lambda line: None
) -> Application:
    """Wait until an application answers, and return it; one that failed, is gone or is late is a ServeError.

    By default there is no timeout, because starting a node and pulling its image can take long, and Serve itself
    reports a failure. `timeout` is in seconds and counts only while the cluster answers; `say` gets lines of progress.
    """
    subject, retrying_caller = f"application {name}", RetryingCaller(say)
    start_time, last_activity = time.monotonic(), ""
    while True:
        application = retrying_caller.call(lambda: find_application(connection, name), None)
        if application and application.status == "RUNNING":
            return application
        if application and application.status == "DEPLOY_FAILED":
            raise ServeError(subject, application.message, "see its log in the dashboard")
        if application and time.monotonic() - start_time > timeout:
            reason = f"not running after {timeout:.0f} s: {application.message or application.status}"
            raise ServeError(subject, reason, "wait, or check that the cluster has the CPUs and GPUs for it")
        if application:
            message = f": {application.message}" if application.message else ""
            if (activity := Activity("waiting:", f"{subject} is {application.status}{message}")) != last_activity:
                say(activity)
            last_activity = activity
        time.sleep(0.5)


def find_application(connection: Connection, name: str) -> Application:
    """Return an application by its name; a ServeError says that it is gone."""
    application = next((a for a in applications(connection) if a.name == name), None)
    if application is None:
        raise ServeError(f"application {name}", "it is gone from the cluster", "deploy it again")
    return application


@dashboard.reads_answers
def applications(connection: Connection, seconds: float = 60) -> list[Application]:
    """Return all applications that Serve runs, sorted by name; `seconds` is the timeout, as in `serve_details`."""
    details = serve_details(connection, seconds)
    http = details.get("http_options") or {}
    base, reachable = _public_url(connection, str(http.get("host")), int(http.get("port") or 0))
    result = []
    for name, app in sorted(details["applications"].items()):
        url = base + (_route(app) or "").rstrip("/")
        config = app["deployed_app_config"]
        is_ours = bool(config and _is_ours(config))
        checkpoint = config["args"]["checkpoint"] if is_ours else None
        adapters = {adapter: str(path) for adapter, path in adapter_paths(config).items()} if is_ours else {}
        result.append(Application(name, url, reachable, app["status"], _message(app), checkpoint, adapters))
    return result


def _public_url(connection: Connection, host: str, port: int) -> tuple[str, bool]:
    """Return the URL of Serve, which listens on this host and port, and whether this machine can reach it."""
    # A wildcard address is replaced by the head node's host, where a proxy of Serve listens. The dashboard's URL has
    # this host, unless the URL is that of a tunnel.
    if host in ("0.0.0.0", "::") and not connection.is_local_machine:
        host = urlsplit(connection.address).hostname or host
    url = dashboard.url_at(host, port)
    return url, connection.is_local_machine or not dashboard.is_loopback(url)


def _is_ours(config: dict[str, Any]) -> bool:
    return bool(config["import_path"] == IMPORT_PATH)


def _check_address(details: dict[str, Any], host: str, port: int) -> None:
    """Raise a ServeError if Serve listens on another host or port; a running Serve silently ignores a new address."""
    http = details.get("http_options")
    if http and (http["host"], http["port"]) != (host, port):
        reason = f"Serve already listens on {http['host']}:{http['port']}, its one address for all applications"
        raise ServeError(f"address {host}:{port}", reason, "use that one, or remove the other applications first")


def _check_route(details: dict[str, Any], application: dict[str, Any]) -> None:
    route = application.get("route_prefix", "/")
    for name, app in details["applications"].items():
        if _route(app) == route and name != application["name"]:
            subject, reason = f"application {application['name']}", f"{name} already answers at {route}"
            raise ServeError(subject, reason, f"take another route, or remove {name}")


def _route(app: dict[str, Any]) -> str | None:
    # While Serve builds an application, it reports no route for it, so the route in the configuration is used.
    route: str | None = app["route_prefix"] or (app["deployed_app_config"] or {}).get("route_prefix")
    return route


def _message(app: dict[str, Any]) -> str:
    # The application's own message only names the deployment that failed, so a deployment's message comes first.
    if app["status"] == "RUNNING":
        return ""
    texts = [*(d["message"] for d in app["deployments"].values()), app["message"]]
    return next((failure_reason(t) for t in texts if t), "")


@dashboard.reads_answers
def deployed_config(connection: Connection, name: str) -> tuple[dict[str, Any], str, int]:
    """Return the configuration of a deployed application, which `deploy` accepts, and Serve's host and port.

    It has URIs in place of the uploaded folders. An application that is missing or foreign is a ServeError.
    """
    subject, details = f"application {name}", serve_details(connection)
    app_config = next((config for config in app_configs(details) if config["name"] == name), None)
    if app_config is None:
        raise ServeError(subject, "there is no such application", "see `mhmoe serve status`")
    if not _is_ours(app_config):
        raise ServeError(subject, "it serves no checkpoint of a run", "update it with the program that deployed it")
    if not connection.local:
        app_config["runtime_env"] = without_packages(app_config.get("runtime_env", {}))
    return app_config, details["http_options"]["host"], details["http_options"]["port"]


def application_stats(application: Application, key: str | None) -> dict[str, Any] | str:
    """Request the serving statistics of one of our applications; return them, or a sentence on why there are none.

    An unreachable application gets no request: its address may be another server's here, which must not see the API
    key.
    """
    # The import takes longer than all other imports of this module, so it is delayed until it is needed.
    import requests

    url = application.url
    if not application.reachable:
        return f"{url} is an address of the cluster's own machine; ask there, or forward its port"
    if key and not is_valid_key(key):
        return "the API key has a character that is not printable ASCII; correct MHMOE_API_KEY"
    dashboard.keep_off_proxies(url)
    try:
        answer = requests.get(f"{url}/stats", headers={"Authorization": f"Bearer {key}"} if key else {}, timeout=10)
        if answer.status_code == 401:
            return "it asks for an API key; give one in MHMOE_API_KEY"
        answer.raise_for_status()
        replica_stats: dict[str, Any] = answer.json()
        return replica_stats
    except requests.RequestException as e:
        return f"{url}/stats: {e}"
