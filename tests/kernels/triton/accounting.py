"""Count of the bytes that autograd saves for a layer."""

import torch


def saved_bytes(function):
    """Return the result of `function`, and the bytes of all storages that autograd saves in it, each counted once."""
    storages = {}

    def pack(tensor):
        storages[id(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    return result, sum(storages.values())
