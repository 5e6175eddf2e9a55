"""Work of compiled code: Inductor fuses a graph as for an H100, and the kernels and bytes are those of its scheduler.

Neither a GPU nor a CUDA build of torch is needed, because nothing is compiled further than to Triton's source. Dynamo
and AOTAutograd trace the graph on fake tensors of the CPU, whose attention operators differ from a GPU's. Then all
tensors of the graph move to a fake GPU, for which Inductor chooses its fusions.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch._inductor import metrics, scheduler
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.compile_fx import (
    _recursive_post_grad_passes,
    _recursive_record_original_output_strides,
    compile_fx,
    fake_tensor_prop,
)
from torch._inductor.debug import DebugContext
from torch._inductor.fx_passes.post_grad import view_to_reshape
from torch._inductor.graph import GraphLowering
from torch._inductor.ir import MultiOutput
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.scheduler import BaseSchedulerNode, ExternKernelSchedulerNode, NopKernelSchedulerNode
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from mhmoe_ray.bench.acceptance.accounting import Work, operation_work
from mhmoe_ray.planner.parts import OPERATOR_PARTS

FUSED, PRODUCTS = "blocks: fused kernels", "blocks: products"
_GPU = torch.device("cuda:0")
_H100 = DeviceProperties(
    type="cuda", index=0, multi_processor_count=132, cc=90, major=9, regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32,
)  # fmt: skip


def counting_backend(parts: dict[str, Work], fake_mode: FakeTensorMode) -> Callable[..., Any]:
    """Return a backend of torch.compile whose code adds its work to `parts`, and returns fake tensors."""

    def compile_graph(graph: torch.fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
        # The outputs are read before the graph moves to the fake GPU.
        outputs: Any = graph.graph.output_node().args[0]
        output_values = [_fake_value(node) for node in outputs]
        # The graph of a backward may be compiled while the modes of the count are active.
        with _disable_current_modes():
            work_by_part = _graph_work(graph, inputs, options)

        def run(arguments: list[Any]) -> list[Any]:
            arguments.clear()
            for part, work in work_by_part.items():
                parts[part] += work
            # Modes that count must not see the allocation of the outputs, which are those of the whole graph.
            with _disable_current_modes():
                return [_fake_copy(v, v.device, fake_mode) if isinstance(v, Tensor) else v for v in output_values]

        run._boxed_call = True  # type: ignore[attr-defined]  # AOTAutograd then passes a list that it owns
        return run

    def backend(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        # A graph from a cache would not be counted.
        with functorch_config.patch(enable_autograd_cache=False):
            return compile_fx(graph, inputs, inner_compile=cast("Any", compile_graph))

    return backend


def _fake_value(node: Any) -> Any:
    return node.meta.get("val") if isinstance(node, torch.fx.Node) else node


def _fake_copy(tensor: Tensor, device: torch.device, fake_mode: FakeTensorMode) -> Tensor:
    with fake_mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


@contextmanager
def _fake_gpu() -> Iterator[None]:
    with ExitStack() as patches:
        for owner, name, value in (
            (torch.cuda, "get_device_properties", _H100),
            (torch.cuda, "get_device_capability", (9, 0)),
            (DeviceProperties, "create", _H100),
            (scheduler, "has_triton", True),
            # Triton's source is enough. Inductor would begin to compile it.
            (AsyncCompile, "triton", None),
            # Triton has no target without a driver. The hash of the target is only a key of a cache.
            (torch.utils._triton, "triton_hash_with_backend", "none"),
        ):
            patches.enter_context(mock.patch.object(owner, name, lambda *_, value=value: value))
        yield


def _graph_work(graph: torch.fx.GraphModule, inputs: Sequence[Any], options: dict[str, Any]) -> dict[str, Work]:
    """Return the work of a graph by part."""
    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": _GPU}
    gpu_inputs = [_fake_copy(t, _GPU, t.fake_mode) if isinstance(t, FakeTensor) else t for t in inputs]
    view_to_reshape(graph)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        fake_mode = fake_tensor_prop(graph, gpu_inputs)
    _recursive_record_original_output_strides(graph)
    with V.set_fake_mode(fake_mode), DebugContext(), _fake_gpu():
        _recursive_post_grad_passes(graph, is_inference=False)
        lowering = GraphLowering(
            graph,
            gpu_inputs,
            is_backward=options.get("is_backward", False),
            get_decomp_fn=options["get_decomp_fn"],
        )
        lowering.freeze_runtime_asserts()
        with V.set_graph_handler(lowering), V.set_extern_kernel_nodes([]):
            lowering.run(*gpu_inputs)
            fused_kernels = -metrics.generated_kernel_count
            lowering.codegen()
            fused_kernels += metrics.generated_kernel_count
            nodes = [n for n in lowering.scheduler.nodes if not isinstance(n, NopKernelSchedulerNode)]
            node_bytes = [n.get_read_write_buffers_sizes() for n in nodes]
    work_by_part = {FUSED: Work(kernels=fused_kernels)}
    for node, moved_bytes in zip(nodes, node_bytes, strict=True):
        part, work = FUSED, Work()
        if isinstance(node, ExternKernelSchedulerNode) and not isinstance(node.node, MultiOutput):
            part, work = _extern_work(node)
        work.bytes = moved_bytes
        work_by_part[part] = work_by_part.get(part, Work()) + work
    return work_by_part


def _extern_work(node: BaseSchedulerNode) -> tuple[str, Work]:
    """Return the part and the work of a kernel that Inductor calls and does not generate."""
    # The origins of a product include the operations on its operands.
    kernel: Any = node.node
    packet = kernel.op_overload.overloadpacket
    matching = (o for o in kernel.get_origins() if getattr(o.target, "overloadpacket", None) is packet)
    if (origin := next(matching, None)) is None:
        return PRODUCTS, Work(kernels=1)
    function, arguments = origin.target, [*origin.args, *origin.kwargs.values()]
    values = torch.fx.node.map_arg(arguments, lambda argument: argument.meta["val"])
    work = operation_work(function, values, origin.meta["val"])
    parts = (part for start, part in OPERATOR_PARTS.items() if function._schema.name.startswith(start))
    return next(parts, PRODUCTS), work
