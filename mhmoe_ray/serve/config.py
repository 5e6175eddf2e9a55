"""The application as an entry of Ray Serve's declarative configuration. Imports neither torch nor ray."""

from collections.abc import Mapping
from typing import Any

from mhmoe_ray.spec import ServeSpec
from mhmoe_ray.storage import Location

IMPORT_PATH = "mhmoe_ray.serve.app:build"
DEPLOYMENT = "completions"
LIMITS = "limits"
"""Name of the second deployment, which exists if API keys have limits."""
ENVIRONMENT = {
    # Refusals of Serve's own, and of replicas that die, in the shape that clients know.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "mhmoe_ray.serve.api.proxy:middlewares",
    # Serve's replicas and proxies hand a token on from thread to thread, and log each request on its way, unless told
    # otherwise. Engines compute in a thread of their own.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
    # A proxy that is not up after three times as many seconds is killed, and the deployment fails: five are too few for
    # a machine at work.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",
}
"""Environment variables of every node that is to serve, set before Ray starts there."""
SPARE = 32
"""Number of requests other than completions that a replica handles at a time."""


def application_config(
    name: str,
    checkpoint: Location,
    spec: ServeSpec,
    model_name: str,
    route: str = "/",
    runtime_env: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return an element of the `applications` list that is PUT to Serve's REST API.

    Args:
        name: the application's name; deploying another application under the same name replaces it.
        checkpoint: a checkpoint directory inside its run directory; a relative path counts from the caller's working
            directory, and every node must be able to read it.
        spec: sizes and limits; its `host` and `port` belong to the cluster's Serve instance and are not used here.
        model_name: the model's name for clients, which they may send as `model`.
        route: path prefix of the application's routes.
        runtime_env: Ray's runtime environment of the replicas.
    """
    deployment = {
        "name": DEPLOYMENT,
        **_scaling(spec),
        # Old replicas end what they have begun.
        "max_surge_percent": 100 if spec.surge else 0,
        "graceful_shutdown_timeout_s": spec.request_timeout,
        # More than the engine lets wait, so that it is the engine that refuses, client by client, and that health is
        # told however many wait.
        "max_ongoing_requests": spec.max_concurrency + spec.max_waiting + SPARE,
        "max_queued_requests": spec.max_waiting * spec.replicas.max + SPARE,
        "backpressure_config": {"status_code": 429, "retry_after_s": 1},
        "ray_actor_options": {"num_cpus": spec.cpus_per_replica, "num_gpus": spec.gpus_per_replica},
    }
    return {
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


def _scaling(spec: ServeSpec) -> dict[str, Any]:
    if not spec.replicas.elastic:
        return {"num_replicas": spec.replicas.min}
    scaling = {
        "min_replicas": spec.replicas.min,
        "max_replicas": spec.replicas.max,
        # Requests under way in a replica and waiting for one.
        "target_ongoing_requests": spec.max_concurrency,
    }
    return {"autoscaling_config": scaling}
