"""What goes to Ray Serve's REST API, and what comes back from it. Imports neither torch nor ray."""

import re
from pathlib import Path
from typing import Any

from mhmoe_ray.spec import ServeSpec

IMPORT_PATH = "mhmoe_ray.serve.app:build"
DEPLOYMENT = "completions"


def application_config(name: str, checkpoint: Path, spec: ServeSpec, model_name: str) -> dict[str, Any]:
    """An element of the `applications` list that is PUT to Serve's REST API.

    Args:
        name: the application's; deploying another one under the same name takes its place.
        checkpoint: absolute; a directory that every node can read, inside its run directory.
        spec: sizes and limits; `host` and `port` belong to the cluster's Serve instance and are not used here.
        model_name: what clients see, and may give, as `model`.
    """
    assert checkpoint.is_absolute()  # a replica has a working directory of its own
    deployment = {
        "name": DEPLOYMENT,
        "num_replicas": spec.replicas,
        "max_ongoing_requests": spec.max_concurrency,
        # Beyond this a request is refused at once: a client had better hear "busy" than wait without an end.
        "max_queued_requests": 4 * spec.max_concurrency * spec.replicas,
        "backpressure_config": {"status_code": 429, "retry_after_s": 1},
        "ray_actor_options": {"num_cpus": spec.cpus_per_replica},
    }
    return {
        "name": name,
        "route_prefix": "/",
        "import_path": IMPORT_PATH,
        "args": {"checkpoint": str(checkpoint), "model": model_name, "max_tokens": spec.max_tokens},
        "deployments": [deployment],
    }


def failure_reason(application: dict[str, Any]) -> str:
    """One line that says why an application failed.

    Args:
        application: its entry of `applications` in the answer of Serve's REST API. What a replica raised is there as a
            traceback, which ends with the error; what `build` raised is there as it is.
    """
    failed = [d["message"] for d in application["deployments"].values() if d["status"] != "HEALTHY" and d["message"]]
    lines = (failed or [application["message"]])[0].strip().splitlines()
    return re.sub(r"^mhmoe_ray\.errors\.\w+: ", "", lines[-1]) if lines else application["status"]
