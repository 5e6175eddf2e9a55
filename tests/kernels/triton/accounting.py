"""Counts of a layer's kernels, of the bytes that they read and write, and of the bytes that autograd saves."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# These operations launch no kernel: they only change the view of a tensor, allocate memory or read properties.
FREE = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand",
    "lift_fresh", "new_empty", "new_empty_strided", "permute", "reshape", "select", "slice", "split", "squeeze", "t",
    "transpose", "unbind", "unsqueeze", "view",
}  # fmt: skip


def tensors_of(values):
    """Return the tensors in arguments or results, which may be in lists."""
    if isinstance(values, torch.Tensor):
        return [values]
    return [t for v in values for t in tensors_of(v)] if isinstance(values, tuple | list) else []


class Accounting(TorchDispatchMode):
    """Context that counts kernels by operation, and the bytes of their operands and results."""

    def __init__(self):
        super().__init__()
        self.kernels, self.bytes, self.shapes = Counter(), Counter(), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        from mhmoe_kernels.triton.operators import LAUNCHES

        results = function(*args, **(kwargs or {}))
        name = function._schema.name.split("::")[1]
        if function.namespace == "prim" or name in FREE:
            return results
        self.kernels[name] += LAUNCHES[name] if function.namespace == "mhmoe" else 1
        operands = {id(t): t for t in (*tensors_of(args), *tensors_of(tuple((kwargs or {}).values())))}
        moved_tensors = [*operands.values(), *tensors_of(results)]
        self.bytes[name] += sum(t.numel() * t.element_size() for t in moved_tensors)
        self.shapes += [(name, tuple(t.shape), t.dtype) for t in tensors_of(results)]
        return results


def saved_bytes(function):
    """Return the result of `function`, and the bytes of all storages that autograd saves in it, each counted once."""
    storages = {}

    def pack(tensor):
        storages[id(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    return result, sum(storages.values())
