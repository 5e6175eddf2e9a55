"""Counts of the kernels that a layer launches, and of the bytes that they move, on fake tensors without values."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mhmoe_ray.bench.acceptance.layers import with_kernel
from mhmoe_ray.bench.acceptance.settings import Settings
from mhmoe_ray.bench.layers import single_layer_spec
from mhmoe_ray.model.moe import MultiHeadMoE
from mhmoe_ray.spec import MoESpec

# These operations launch no kernel: they only change the view of a tensor, allocate memory or read properties.
FREE = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand",
    "lift_fresh", "new_empty", "new_empty_strided", "permute", "reshape", "select", "slice", "split", "squeeze", "t",
    "transpose", "unbind", "unsqueeze", "view",
}  # fmt: skip


class Accounting(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types for it
    """Context that counts kernels by operation, and the bytes of their operands and results."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels, self.bytes = Counter[str](), Counter[str]()
        self.shapes: list[tuple[str, tuple[int, ...], torch.dtype]] = []

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        from mhmoe_kernels.operators import LAUNCHES

        results = function(*args, **(kwargs or {}))
        name = function._schema.name.split("::")[1]
        if function.namespace == "prim" or name in FREE:
            return results
        self.kernels[name] += LAUNCHES[name] if function.namespace == "mhmoe" else 1
        operands = {id(t): t for t in (*_tensors_of(args), *_tensors_of(tuple((kwargs or {}).values())))}
        moved_tensors = [*operands.values(), *_tensors_of(results)]
        self.bytes[name] += sum(t.numel() * t.element_size() for t in moved_tensors)
        self.shapes += [(name, tuple(t.shape), t.dtype) for t in _tensors_of(results)]
        return results


def _tensors_of(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    return [t for v in values for t in _tensors_of(v)] if isinstance(values, tuple | list) else []


def run_pass(module: nn.Module, x_BTM: Tensor) -> None:
    """Run a layer forward and backward in bfloat16, from its tokens to all gradients, with both losses of the router.

    The gradients have arbitrary values.
    """
    # Old gradients are dropped, because adding to them would launch kernels that do not belong to the layer. So would
    # filling the gradients of the outputs.
    for leaf in (x_BTM, *module.parameters()):
        leaf.grad = None
    with torch.autocast(x_BTM.device.type, torch.bfloat16):
        y_BTM, routing = module(x_BTM)
    outputs = (y_BTM, routing.balance_loss, routing.z_loss)
    torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])


def count_pass(
    settings: Settings, moe: MoESpec, kernel: str, tokens: int, dtype: torch.dtype = torch.float32
) -> Accounting:
    """Count the kernels and bytes of `run_pass` for a layer with weights in `dtype`; `grouped` needs values and fails.

    The fake tensors are on the settings' device, because a CPU build of torch aborts in a backward on others.
    """
    accounting, previous_dtype = Accounting(), torch.get_default_dtype()
    # Other threads than this one do not have the modes that count.
    with FakeTensorMode(), torch.autograd.set_multithreading_enabled(False):
        # A module of fake tensors cannot be converted to another dtype.
        torch.set_default_dtype(dtype)
        try:
            with torch.device(settings.device):
                module = MultiHeadMoE(single_layer_spec(settings.layer_width, with_kernel(moe, kernel)))
        finally:
            torch.set_default_dtype(previous_dtype)
        x_BTM = torch.empty(
            1, tokens, settings.layer_width, dtype=torch.bfloat16, device=settings.device, requires_grad=True
        )
        with accounting:
            run_pass(module, x_BTM)
    return accounting
