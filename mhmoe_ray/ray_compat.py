"""All private interfaces of Ray that this project uses, so that a new version of Ray affects only this file.

Ray 2.60 has no public hook for these uses. Ray's own module is imported when a name is imported from here, so that
commands which need none of it stay fast. `tests/test_ray_compat.py` fails if Ray lacks one of the names, or if another
file uses Ray's private modules.
"""

from importlib import import_module
from typing import Any

_TRAIN = "ray.train.v2._internal."
_PACKAGING = "ray._private.runtime_env.packaging"

SDK_LOGGERS = ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")
"""Loggers to which Ray's base HTTP client and its job client write a line for every upload."""

PRIVATE_NAMES = {
    # Free resources of each node, and nodes that are being drained, for `train/resilience.py`.
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
    "ENABLE_NCCL_HANG_DETECTOR_ENV_VAR": _TRAIN + "constants",
    "NCCL_RAS_CONFIRM_DURATION_S_ENV_VAR": _TRAIN + "constants",
    "WorkerGroupStartupTimeoutError": _TRAIN + "exceptions",
    "TrainController": _TRAIN + "execution.controller",
    "get_train_context": _TRAIN + "execution.context",
    # Set-up of the process group of a run's ranks, for `train/rendezvous.py`.
    "get_address_and_port": "ray.train._internal.utils",
    "_set_torch_distributed_env_vars": "ray.train.torch.config",
    "_setup_torch_process_group": "ray.train.torch.config",
    "_shutdown_torch": "ray.train.torch.config",
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
    # Opens the port of a replica of Ray Serve, for `bind_replica` below.
    "add_port_to_grpc_server": "ray.serve._private.replica",
}
"""Ray's module that defines each of its private names used here."""


def __getattr__(name: str) -> Any:
    if name not in PRIVATE_NAMES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module(PRIVATE_NAMES[name]), name)


def block_bundles(dataset: Any) -> Any:
    """Return an iterator that computes a Ray Dataset's blocks one by one, as references that are not fetched."""
    return dataset.iter_internal_ref_bundles()


def bind_replica() -> None:
    """Let the port that Ray Serve will open in this replica listen on loopback if its node does; by default never."""
    import ray

    replica: Any = import_module(PRIVATE_NAMES["add_port_to_grpc_server"])
    open_port = replica.add_port_to_grpc_server
    if ray.util.get_node_ip_address() == "127.0.0.1":
        replica.add_port_to_grpc_server = lambda server, _: open_port(server, "127.0.0.1:0")
