"""Rendezvous of the ranks of a run: the store at rank 0, by which all ranks learn each other's addresses.

Ray's own configuration for torch imports torch in the job and in Ray Train's controller too, which takes seconds in
each. Here only the workers import it.
"""

import os
import socket
from importlib import import_module
from typing import Any

import ray
import ray.train
from ray.train.backend import Backend, BackendConfig

from mhmoe_ray import ray_compat

LEAVE_SECONDS = 30.0
"""Timeout for the end of a process group, after which Ray ends the processes."""


class RankConfig(BackendConfig):
    """Configuration of Ray Train with which the workers form a process group of torch if they are several."""

    backend_cls = property(lambda _: _RankBackend)


class _RankBackend(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        # A single worker gets no process group. Parallelism strategies would use it, which only costs time.
        if len(worker_group) > 1:
            address, port = worker_group.execute_single(0, ray_compat.get_address_and_port)
            backend = "nccl" if worker_group.get_resources_per_worker().get("GPU") else "gloo"
            worker_group.execute(_join_ranks, backend, address, port)

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        try:
            ray.get(worker_group.execute_async(_leave_ranks, len(worker_group) > 1), timeout=LEAVE_SECONDS)
        except ray.exceptions.GetTimeoutError:
            print(f"warning: the ranks did not leave their process group within {LEAVE_SECONDS:.0f} s")


def _join_ranks(backend: str, address: str, port: int) -> None:
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    _bind_store()
    ray_compat._set_torch_distributed_env_vars()
    context = ray.train.get_context()
    ray_compat._setup_torch_process_group(backend, context.get_world_rank(), context.get_world_size(), "env://")


def _leave_ranks(has_process_group: bool) -> None:
    ray_compat._shutdown_torch(destroy_process_group=has_process_group)


def _bind_store() -> None:
    """Let the store listen on loopback if the node of rank 0 does; by default it never does."""
    # `torch.distributed.rendezvous` is a function as an attribute, and the module only by its name.
    module: Any = import_module("torch.distributed.rendezvous")
    store_class = module.TCPStore

    def open_store(**options: Any) -> Any:
        # torch has no option for the address. It only takes a socket that listens already.
        if options["is_master"] and options["host_name"] == "127.0.0.1":
            listener = socket.create_server((options["host_name"], options["port"]))
            options["master_listen_fd"] = listener.detach()
        return store_class(**options)

    module.TCPStore = open_store
