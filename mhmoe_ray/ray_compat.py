"""All private interfaces of Ray that this project uses: the only file that changes when a new Ray moves them.

Ray 2.60 has no public hook for these uses. Import a name from here as from any module; Ray's own module is imported at
that moment, so that commands which need none of it stay fast. `tests/test_ray_compat.py` finds a name that Ray no
longer has, and a use of Ray's private modules in any other file.
"""

from importlib import import_module
from typing import Any

_TRAIN = "ray.train.v2._internal."
_PACKAGING = "ray._private.runtime_env.packaging"

SDK_LOGGERS = ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")
"""Names of the loggers to which Ray's HTTP clients write a line for every upload: the base client's and the job
client's."""

PRIVATE_NAMES = {
    # Resources of the cluster, node by node, for `train/resilience.py`.
    "available_resources_per_node": "ray._private.state",
    "state": "ray._private.state",
    # Ray Train's controller, with its decisions about failures, worker counts and placement groups, for
    # `train/resilience.py`.
    "DefaultFailurePolicy": _TRAIN + "execution.failure_handling",
    "FailureDecision": _TRAIN + "execution.failure_handling",
    "ElasticScalingPolicy": _TRAIN + "execution.scaling_policy",
    "NoopDecision": _TRAIN + "execution.scaling_policy",
    "ResizeDecision": _TRAIN + "execution.scaling_policy",
    "ScalingDecision": _TRAIN + "execution.scaling_policy",
    "PlacementGroupCleanerCallback": _TRAIN + "callbacks.placement_group_callback",
    "WORKER_GROUP_START_TIMEOUT_S_ENV_VAR": _TRAIN + "constants",
    "WorkerGroupStartupTimeoutError": _TRAIN + "exceptions",
    "get_train_context": _TRAIN + "execution.context",
    # Callbacks of the loop that executes a dataset, for `data/stream.py`.
    "ExecutionCallback": "ray.data._internal.execution.execution_callback",
    # Accelerators of this machine, as `ray start` counts them, for `cluster/nodes.py`.
    "get_accelerator_manager_for_resource": "ray._private.accelerators",
    # Rules for the files that Ray sends with a job, and the largest size of their package, for `cluster/packages.py`.
    "GCS_STORAGE_MAX_SIZE": _PACKAGING,
    "_get_excludes": _PACKAGING,
    "get_excludes_from_ignore_files": _PACKAGING,
    # Client that sends configurations to Ray Serve, for `cluster/serve_client.py`.
    "ServeSubmissionClient": "ray.dashboard.modules.serve.sdk",
}
"""Module of Ray that holds each name."""


def __getattr__(name: str) -> Any:
    """Import Ray's private object of this name, and return it; Python calls this for a name that the module lacks.

    Raises:
        AttributeError: the name is not in PRIVATE_NAMES.
        ImportError: this version of Ray has no such module.
    """
    if name not in PRIVATE_NAMES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module(PRIVATE_NAMES[name]), name)


def block_bundles(dataset: Any) -> Any:
    """Return an iterator over the blocks of a Ray Dataset, as bundles of references.

    It computes the blocks one after the other, and does not fetch them.
    """
    return dataset.iter_internal_ref_bundles()
