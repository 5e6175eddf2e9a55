"""The server as an application in Ray Serve's configuration: its replicas, autoscaling, queues and resources.

Serve's autoscaling needs a range as the spec's `replicas`. This module imports neither torch nor ray.
"""

from collections.abc import Mapping
from typing import Any

from mhmoe_ray.spec import ServeSpec
from mhmoe_ray.storage import Location, location

IMPORT_PATH = "mhmoe_ray.serving.app:build"
DEPLOYMENT = "completions"
LIMITS_DEPLOYMENT = "limits"
"""Name of the deployment that checks the rate limits of API keys; it exists only if a key has a limit."""
ENVIRONMENT = {
    # This middleware turns errors of Serve's proxies, and of replicas that die, into the format of OpenAI's errors.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "mhmoe_ray.serving.api.proxy:middlewares",
    # By default Serve's replicas and proxies pass each token through several threads, which only cost time, because
    # engines compute in a thread of their own. The next two settings turn these threads off. By default Serve also
    # flushes a log line for each request. The third setting makes it collect 1,000 lines first.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
    # Chunks of streams go from replicas to proxies over gRPC, which costs less than Serve's default, object references.
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    # Serve kills a proxy that is not ready after three checks, each with this timeout, and then the deployment fails.
    # The default of five seconds is too short for a busy machine.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",
    # By default Serve waits `graceful_shutdown_timeout_s` for the requests of a replica that answers no health check.
    # Such a replica finishes none, so its clients and `mhmoe serve down` would wait in vain.
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
}
"""Environment variables of every node that serves; they must be set before Ray starts there."""
SPARE_REQUESTS = 32
"""Number of requests other than completions, such as health checks, that a replica handles at a time."""


def application_config(
    name: str,
    checkpoint: Location,
    spec: ServeSpec,
    model_name: str,
    route: str = "/",
    runtime_env: Mapping[str, Any] | None = None,
    adapters: Mapping[str, Location] | None = None,
) -> dict[str, Any]:
    """Return the application as an element of the `applications` list for a PUT to Serve's REST API.

    Another application of the same name is replaced. Every node must be able to read the checkpoint, whose relative
    path counts from the caller's working directory. The spec's `host` and `port` belong to the cluster's Serve instance
    and are unused. `adapters` has the checkpoint of each adapter of the spec.
    """
    deployment = {
        "name": DEPLOYMENT,
        **_replica_options(spec),
        "max_surge_percent": 100 if spec.surge else 0,
        # A replica that an update or autoscaling removes gets this time to finish its running requests.
        "graceful_shutdown_timeout_s": spec.request_timeout,
        # Serve's limits on requests are above the engine's limit. So it is the engine that refuses requests, because it
        # knows the clients, and health checks are answered however many requests wait. Only requests whose bodies would
        # take too much memory or time are refused earlier, by `BodyLimits`.
        "max_ongoing_requests": spec.max_concurrency + spec.max_waiting + SPARE_REQUESTS,
        "max_queued_requests": spec.max_waiting * spec.replicas.max + SPARE_REQUESTS,
        "backpressure_config": {"status_code": 429, "retry_after_s": 1},
        "ray_actor_options": {"num_cpus": spec.cpus_per_replica, "num_gpus": spec.gpus_per_replica},
    }
    max_adapters = max(spec.max_adapters, len(adapters or {}))
    spec = spec.model_copy(update={"adapters": {}, "max_adapters": max_adapters})
    config = {
        "name": name,
        "route_prefix": route,
        "import_path": IMPORT_PATH,
        "runtime_env": dict(runtime_env or {}),
        "args": {
            "checkpoint": str(checkpoint.absolute()),
            "model": model_name,
            "serve": spec.model_dump(mode="json"),
        },
        "deployments": [deployment],
    }
    if max_adapters:
        set_adapters(config, adapters or {})
    return config


def adapter_paths(config: dict[str, Any]) -> dict[str, Location]:
    """Return the checkpoint of each adapter of an application's configuration."""
    user_configs = (deployment.get("user_config") or {} for deployment in config.get("deployments", ()))
    return {name: location(path) for user in user_configs for name, path in user.get("adapters", {}).items()}


def set_adapters(config: dict[str, Any], adapters: Mapping[str, Location]) -> None:
    """Set the checkpoint of each adapter in an application's configuration."""
    # Serve restarts replicas if the arguments change, but passes a new `user_config` to those that run.
    paths = {name: str(path.absolute()) for name, path in adapters.items()}
    config["deployments"][0]["user_config"] = {"adapters": paths}


def _replica_options(spec: ServeSpec) -> dict[str, Any]:
    """Return the deployment's number of replicas, or autoscaling if the spec has a range of numbers."""
    if not spec.replicas.is_elastic:
        return {"num_replicas": spec.replicas.min}
    autoscaling = {
        "min_replicas": spec.replicas.min,
        "max_replicas": spec.replicas.max,
        # Autoscaling counts the requests that run in a replica or wait for one. Requests beyond those that an engine
        # computes at a time only wait, so they call for another replica.
        "target_ongoing_requests": spec.max_concurrency,
    }
    return {"autoscaling_config": autoscaling}
