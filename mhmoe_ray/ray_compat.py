"""All private interfaces of Ray that this project uses, so that a new version of Ray affects only this file.

Ray 2.60 has no public hook for these uses. Ray's own module is imported when a name is imported from here, so that
commands which need none of it stay fast. The name is checked then, and one that this Ray lacks is a ClusterError.
`mhmoe doctor` checks all names. `tests/test_ray_compat.py` fails if another file uses a private name that is not in the
table.
"""

import inspect
import warnings
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.metadata import version
from typing import Any, NamedTuple

from mhmoe_ray.errors import ClusterError

RAY_RELEASE = "2.60"
"""Minor version of Ray that has these interfaces. Patches of it may differ between this machine and a cluster."""
RAY_INSTALLATION = f"pip install 'ray=={RAY_RELEASE}.*'"
SDK_LOGGERS = ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")
"""Loggers to which Ray's base HTTP client and its job client write a line for every upload."""


class PrivateName(NamedTuple):
    """A private name of Ray, and what this project uses of it."""

    module: str
    user: str
    """File of this package that needs the name."""
    parameters: str = ""
    """Parameters of the function, or of the class when it is constructed, with spaces between them."""
    members: Mapping[str, str] = {}
    """Parameters of the methods, and of those that a subclass here overrides, by name; private ones too."""


_TRAIN = "ray.train.v2._internal."
_PACKAGING, _TORCH = "ray._private.runtime_env.packaging", "ray.train.torch.config"
_RESILIENCE, _RENDEZVOUS, _PREEMPTION = "train/resilience.py", "train/rendezvous.py", "train/preemption.py"
_PACKAGES, _PLACEMENT = "cluster/packages.py", "train/placement.py"

PRIVATE_NAMES = {
    # Free resources of each node, and nodes that are being drained.
    "available_resources_per_node": PrivateName("ray._private.state", _PLACEMENT),
    "state": PrivateName(
        "ray._private.state",
        _PLACEMENT,
        members={"get_draining_nodes": "", "get_max_resources_from_cluster_config": ""},
    ),
    # Ray Train's controller, with its decisions about failures, worker counts and placement groups.
    "DataParallelTrainer": PrivateName(
        "ray.train.v2.api.data_parallel_trainer",
        _RESILIENCE,
        "train_loop_per_worker backend_config",
        {
            "_create_default_callbacks": "",
            "_initialize_and_run_controller": "",
            "_register_sigint_handler": "controller",
        },
    ),
    "DefaultFailurePolicy": PrivateName(
        _TRAIN + "execution.failure_handling", _RESILIENCE, "failure_config", {"make_decision": "training_failed_error"}
    ),
    "FailureDecision": PrivateName(_TRAIN + "execution.failure_handling", _RESILIENCE, members={"RAISE": ""}),
    "ElasticScalingPolicy": PrivateName(
        _TRAIN + "execution.scaling_policy",
        _RESILIENCE,
        "scaling_config",
        {
            "make_decision_for_running_worker_group": "worker_group_state worker_group_status",
            "make_decision_for_non_running_worker_group": "",
            "_count_possible_workers": "",
            "_maybe_send_resource_request": "",
        },
    ),
    "NoopDecision": PrivateName(_TRAIN + "execution.scaling_policy", _RESILIENCE),
    "ResizeDecision": PrivateName(_TRAIN + "execution.scaling_policy", _RESILIENCE, "num_workers"),
    "ScalingDecision": PrivateName(_TRAIN + "execution.scaling_policy", _RESILIENCE),
    "PlacementGroupCleanerCallback": PrivateName(_TRAIN + "callbacks.placement_group_callback", _RESILIENCE),
    "WORKER_GROUP_START_TIMEOUT_S_ENV_VAR": PrivateName(_TRAIN + "constants", _RESILIENCE),
    "ENABLE_NCCL_HANG_DETECTOR_ENV_VAR": PrivateName(_TRAIN + "constants", _RESILIENCE),
    "NCCL_RAS_CONFIRM_DURATION_S_ENV_VAR": PrivateName(_TRAIN + "constants", _RESILIENCE),
    "WorkerGroupStartupTimeoutError": PrivateName(_TRAIN + "exceptions", _RESILIENCE),
    "TrainController": PrivateName(
        _TRAIN + "execution.controller",
        _PLACEMENT,
        "failure_policy scaling_policy train_run_context",
        {"run": "", "get_result": "", "_start_worker_group": "num_workers resources_per_worker"},
    ),
    # The preemption notice of a rank.
    "get_train_context": PrivateName(_TRAIN + "execution.context", _PREEMPTION),
    "TrainContext": PrivateName(_TRAIN + "execution.context", _PREEMPTION, "preemption_context"),
    # Set-up of the process group of a run's ranks.
    "get_address_and_port": PrivateName("ray.train._internal.utils", _RENDEZVOUS),
    "_set_torch_distributed_env_vars": PrivateName(_TORCH, _RENDEZVOUS),
    "_setup_torch_process_group": PrivateName(_TORCH, _RENDEZVOUS, "backend world_rank world_size init_method"),
    "_shutdown_torch": PrivateName(_TORCH, _RENDEZVOUS, "destroy_process_group"),
    # Callbacks of the loop that executes a dataset.
    "ExecutionCallback": PrivateName(
        "ray.data._internal.execution.execution_callback", "data/stream.py", members={"on_execution_step": "executor"}
    ),
    # A Ray Dataset, for `block_bundles` below.
    "Dataset": PrivateName("ray.data", "data/inspect/survey.py", members={"iter_internal_ref_bundles": ""}),
    # Accelerators of this machine, as `ray start` counts them.
    "get_accelerator_manager_for_resource": PrivateName(
        "ray._private.accelerators", "cluster/nodes.py", "resource_name"
    ),
    # Rules for the files that Ray sends with a job, and the largest size of their package.
    "GCS_STORAGE_MAX_SIZE": PrivateName(_PACKAGING, _PACKAGES),
    "_get_excludes": PrivateName(_PACKAGING, _PACKAGES, "path excludes"),
    "get_excludes_from_ignore_files": PrivateName(_PACKAGING, _PACKAGES, "path include_gitignore logger"),
    # Base class of Ray's clients, for `upload_folders` below.
    "SubmissionClient": PrivateName(
        "ray.dashboard.modules.dashboard_sdk",
        "cluster/jobs.py",
        members={"_upload_working_dir_if_needed": "runtime_env", "_upload_py_modules_if_needed": "runtime_env"},
    ),
    # Client that sends configurations to Ray Serve.
    "ServeSubmissionClient": PrivateName("ray.dashboard.modules.serve.sdk", "cluster/serve_client.py", "headers"),
    # Opens the port of a replica of Ray Serve, for `bind_replica` below.
    "add_port_to_grpc_server": PrivateName("ray.serve._private.replica", "serving/app.py", "server address"),
}
"""The private names of Ray that are used here, each with its module and user."""


def is_tested_release(release: str) -> bool:
    """Return whether a version of Ray is a patch of `RAY_RELEASE`."""
    return release.split(".")[:2] == RAY_RELEASE.split(".")


def __getattr__(name: str) -> Any:
    if name not in PRIVATE_NAMES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return _checked_value(name)


def _checked_value(name: str) -> Any:
    """Return the value of a private name; one that this Ray lacks, or has in another form, is a ClusterError."""
    private_name = PRIVATE_NAMES[name]
    try:
        value = getattr(import_module(private_name.module), name)
    except (ImportError, AttributeError) as e:
        raise _missing_error(private_name, str(e)) from e
    for difference in _differences(name, value, private_name):
        raise _missing_error(private_name, difference)
    return value


def _differences(name: str, value: Any, private_name: PrivateName) -> Iterator[str]:
    """Yield what a value lacks of the members and parameters that this project uses."""
    used_parameters = {name: (value, private_name.parameters)}
    for member, parameters in private_name.members.items():
        if not hasattr(value, member):
            yield f"{private_name.module}.{name} has no {member}"
        else:
            used_parameters[f"{name}.{member}"] = (getattr(value, member), parameters)
    for title, (function, parameters) in used_parameters.items():
        for parameter in parameters.split():
            if parameter not in inspect.signature(function).parameters:
                yield f"{private_name.module}.{title} has no parameter {parameter}"


def _missing_error(private_name: PrivateName, difference: str) -> ClusterError:
    reason = f"{private_name.user} needs a private interface that this version changed: {difference}"
    return ClusterError(f"Ray {version('ray')}", reason, RAY_INSTALLATION)


def check_private_names() -> None:
    """Raise a ClusterError if the installed Ray lacks any of the private names; this imports much of Ray."""
    with warnings.catch_warnings():
        # Ray Serve defines fields in a way that pydantic will drop.
        warnings.filterwarnings("ignore", "Using extra keyword arguments on `Field`")
        for name in PRIVATE_NAMES:
            _checked_value(name)


def block_bundles(dataset: Any) -> Any:
    """Return an iterator that computes a Ray Dataset's blocks one by one, as references that are not fetched."""
    return dataset.iter_internal_ref_bundles()


def upload_folders(client: Any, runtime_env: dict[str, Any]) -> None:
    """Upload the local folders of a runtime environment by a client of Ray, and replace them by their URIs."""
    client._upload_working_dir_if_needed(runtime_env)
    client._upload_py_modules_if_needed(runtime_env)


def bind_replica() -> None:
    """Let the port that Ray Serve will open in this replica listen on loopback if its node does; by default never."""
    import ray

    open_port = _checked_value("add_port_to_grpc_server")
    replica: Any = import_module(PRIVATE_NAMES["add_port_to_grpc_server"].module)
    if ray.util.get_node_ip_address() == "127.0.0.1":
        replica.add_port_to_grpc_server = lambda server, _: open_port(server, "127.0.0.1:0")
