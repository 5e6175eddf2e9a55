"""Counts of kernels, of the bytes that they move and of FLOPs of matrix products, on fake tensors without values.

Attention counts half of its FLOPs if it is causal. The FLOPs of the fused expert kernels (`triton`) are not counted.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from mhmoe_ray.bench.acceptance.goals import BANDWIDTH, FLOAT32_FLOPS, LAUNCH_SECONDS, PEAK_FLOPS
from mhmoe_ray.bench.acceptance.layers import with_kernel
from mhmoe_ray.bench.acceptance.settings import Settings
from mhmoe_ray.bench.layers import single_layer_spec
from mhmoe_ray.model.moe import MultiHeadMoE
from mhmoe_ray.spec import MoESpec

# These operations launch no kernel: they only change the view of a tensor, allocate memory or read properties.
FREE = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand",
    "lift_fresh", "new_empty", "new_empty_strided", "permute", "reshape", "select", "slice", "split",
    "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view",
}  # fmt: skip

TORCH_LAUNCHES = {"_fused_rms_norm_backward": 2, "_scaled_dot_product_flash_attention_for_cpu_backward": 3}
"""Kernels of torch's operations on GPUs that launch more than one."""

SPARSE_OPERANDS = {"embedding": 0, "gather": 0, "nll_loss_backward": 1, "nll_loss_forward": 0, "scatter_add_": 0}
"""Argument of which an operation touches only the values that its indices name, so that its bytes do not count."""
MULTI_TENSOR_BLOCKS, MULTI_TENSOR_VALUES = 320, 65536
"""Blocks of a launch, and values of a block, of torch's operations over lists of tensors (MultiTensorApply.cuh)."""


@dataclass
class Work:
    """Kernels, bytes and FLOPs, and the seconds of these FLOPs at the ceiling of their dtype."""

    kernels: float = 0
    bytes: float = 0
    flops: float = 0
    flop_seconds: float = 0

    def __add__(self, more_work: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(vars(self).values(), vars(more_work).values(), strict=True)))

    def scaled(self, factor: float) -> "Work":
        return Work(*(factor * value for value in vars(self).values()))

    @property
    def seconds(self) -> float:
        """Seconds of the FLOPs, bytes and kernels one after another at the ceilings in `goals.py`."""
        return self.flop_seconds + self.bytes / BANDWIDTH + self.kernels * LAUNCH_SECONDS


def operation_work(function: torch._ops.OpOverload, arguments: Sequence[Any], results: Any) -> Work:
    """Return the work of an operation of torch or of our kernels, whose tensors may be fake."""
    from mhmoe_kernels.operators import LAUNCHES

    name = function._schema.name.split("::")[1]
    if function.namespace in ("prim", "profiler") or name in FREE:
        return Work()
    operands = list({id(t): t for t in _tensors_of(arguments)}.values())
    outputs = _tensors_of(results)
    kernels = LAUNCHES[name] if function.namespace == "mhmoe" else TORCH_LAUNCHES.get(name, 1)
    if name.startswith(("_foreach", "_fused_adam")):
        lists = [_tensors_of(a) for a in arguments if isinstance(a, list | tuple)]
        blocks = sum(math.ceil(t.numel() / MULTI_TENSOR_VALUES) for t in lists[0])
        kernels = math.ceil(blocks / MULTI_TENSOR_BLOCKS)
    flops = _operation_flops(function, name, arguments, operands, results)
    rate = FLOAT32_FLOPS if flops and operands[0].dtype == torch.float32 else PEAK_FLOPS
    # An operation that only fills its result reads nothing. One without results writes those operands that it changes.
    reads = [] if name.endswith("_like") or name.startswith("new_") else operands
    schema_arguments = zip(function._schema.arguments, arguments, strict=False)
    writes = outputs or [
        t for a, v in schema_arguments if a.alias_info and a.alias_info.is_write for t in _tensors_of(v)
    ]
    sparse = arguments[SPARSE_OPERANDS[name]] if name in SPARSE_OPERANDS else None
    moved_bytes = sum(t.numel() * t.element_size() for t in (*reads, *writes) if t is not sparse)
    return Work(kernels, moved_bytes, flops, flops / rate)


def _operation_flops(
    function: torch._ops.OpOverload, name: str, arguments: Sequence[Any], operands: Sequence[Tensor], results: Any
) -> int:
    if name in ("grouped_linear", "torch_linear"):
        # A known row of the result is not computed. The product with a second matrix has the same size.
        known_rows = len(arguments[5]) if name == "grouped_linear" and arguments[5] is not None else 0
        products = 1 + (name == "grouped_linear" and arguments[2] is not None)
        return 2 * products * (len(operands[0]) - known_rows) * math.prod(operands[1].shape[1:])
    if name in ("grouped_outer", "torch_outer"):
        return 2 * operands[0].numel() * operands[1].shape[1]
    if name.startswith("_scaled_dot_product"):
        is_backward = "backward" in name
        query, key = operands[is_backward : is_backward + 2]
        scores = math.prod(query.shape[:3]) * key.shape[2] // (1 + any(a is True for a in arguments))
        return 2 * scores * query.shape[3] * (5 if is_backward else 2)
    formula = flop_registry.get(function._overloadpacket)
    return 0 if formula is None else formula(*arguments, out_val=results)


class Accounting(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types for it
    """Context that counts kernels and bytes by operation, and the work of each `part`.

    In it RMSNorm is an operation of its own, as on GPUs; on CPUs torch composes it of others.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels, self.bytes = Counter[str](), Counter[str]()
        self.shapes: list[tuple[str, tuple[int, ...], torch.dtype]] = []
        self.parts: dict[str, Work] = defaultdict(Work)

    def __enter__(self) -> Any:
        # Without a kernel for CPUs, torch composes the operation. Fake tensors never call this kernel.
        self._library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
        self._library.impl("_fused_rms_norm", _refuse, "CPU")  # type: ignore[no-untyped-call]
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *arguments: Any) -> None:
        self._library._destroy()  # type: ignore[no-untyped-call]
        super().__exit__(*arguments)  # type: ignore[no-untyped-call]

    @property
    def part(self) -> str:
        """Name of the part to which the current operation belongs."""
        return ""

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        results = function(*args, **(kwargs or {}))
        work = operation_work(function, (*args, *(kwargs or {}).values()), results)
        if work.kernels:
            name = function._schema.name.split("::")[1]
            self.kernels[name] += int(work.kernels)
            self.bytes[name] += int(work.bytes)
            self.shapes += [(name, tuple(t.shape), t.dtype) for t in _tensors_of(results)]
            self.parts[self.part] += work
        return results


def _refuse(*_: Any) -> None:
    raise AssertionError("the norm of a real tensor is not counted")


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
