"""Rendezvous of the ranks of a run: the store at rank 0, by which all ranks learn each other's addresses."""

import socket
from importlib import import_module
from typing import Any

from ray.train.torch import TorchConfig

from mhmoe_ray.ray_compat import _TorchBackend


class NodeTorchConfig(TorchConfig):
    """Configuration of torch whose store listens on loopback if the node of rank 0 does; by default it never does."""

    backend_cls = property(lambda _: _NodeTorchBackend)


class _NodeTorchBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(_bind_store)
        super().on_start(worker_group, backend_config)


def _bind_store() -> None:
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
