"""Work of a whole training step as on a GPU, counted with fake tensors by the part of the step.

The trainer itself runs one rank's micro-batches and its update, so the count has all that a step launches, but neither
exchanges between ranks nor copies to and from the host. Operations of a forward belong to the module that is running;
those of a backward to the module whose forward they differentiate. Compiled blocks are counted by `compiled.py`.
"""

from bisect import bisect
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mhmoe_kernels import triton
from mhmoe_ray.bench.acceptance.accounting import Accounting, Work
from mhmoe_ray.bench.steps import StepCase
from mhmoe_ray.errors import SpecError
from mhmoe_ray.model.loss import PRODUCT_ROWS
from mhmoe_ray.model.parts import observed_parts, part_names
from mhmoe_ray.model.trunk import Trunk
from mhmoe_ray.planner.kernels import planned_model
from mhmoe_ray.planner.parts import BLOCKS, CASTS, EMBEDDING, LOSS
from mhmoe_ray.spec import ClusterSpec, RunSpec
from mhmoe_ray.train import step


class StepAccounting(Accounting):  # type: ignore[no-untyped-call]  # torch has no types for it
    """Context that counts a training step by part. Values that the host reads are 1."""

    def __init__(self, model: Trunk) -> None:
        super().__init__()
        self.outer_part = CASTS
        """Part of operations outside all modules that are parts."""
        self._modules: list[str] = []  # parts of the modules whose forward is running
        self._starts: list[tuple[int, str]] = [(0, CASTS)]
        """First sequence number of autograd's nodes that belong to a part, ascending."""
        self._part_of_parameter: dict[nn.Parameter, str] = {}
        names = part_names(model)
        for name, module in model.named_modules():
            block_part = BLOCKS if name.startswith("blocks.") else LOSS if name in ("norm", "output") else EMBEDDING
            self._part_of_parameter |= dict.fromkeys(module.parameters(), names.get(name, block_part))

    def enter_module(self, part: str) -> None:
        self._modules.append(part)
        self._note_start()

    def leave_module(self) -> None:
        self._modules.pop()
        self._note_start()

    def begin_part(self, part: str) -> None:
        self.outer_part = part
        self._note_start()

    def _note_start(self) -> None:
        self._starts.append(
            (torch._C._autograd._get_sequence_nr(), self._modules[-1] if self._modules else self.outer_part)
        )

    @property
    def part(self) -> str:
        node = torch._C._current_autograd_node()
        # A recomputed forward runs inside a node of autograd, too.
        if self._modules or node is None:
            return self._modules[-1] if self._modules else self.outer_part
        if (parameter := getattr(node, "variable", None)) is not None:
            return self._part_of_parameter[parameter]
        return self._starts[bisect(self._starts, node._sequence_nr(), key=lambda start: start[0]) - 1][1]

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        return super().__torch_dispatch__(function, types, args, kwargs)

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True


def count_step(spec: RunSpec) -> dict[str, Work]:
    """Return the work of a rank's training step by part. A spec whose step needs values is a SpecError."""
    moe, cluster = planned_model(spec).moe, spec.cluster
    for reason, fix in (
        (cluster.ep > 1 and f"cluster.ep is {cluster.ep}, and exchanges between ranks are not counted", "set it to 1"),
        (not spec.model.family.predicts_next_token and "only decoders are counted", "name the spec of a decoder"),
        (
            moe is not None and moe.kernel in ("grouped", "capacity") and f"kernel {moe.kernel} needs values",
            "set model.moe.kernel to grouped_gemm",
        ),
    ):
        if reason:
            raise SpecError(f"spec {spec.name}", reason, fix)
    micro_batches = spec.train.micro_batches // cluster.workers.max
    parts = _count(spec, 1)
    if micro_batches > 1:
        # Each further micro-batch has the same work.
        two = _count(spec, 2)
        parts = {n: parts[n].scaled(2 - micro_batches) + two[n].scaled(micro_batches - 1) for n in two}
    return dict(parts)


def _no_reason(_: torch.device) -> None:
    """Return None, as on a GPU; torch.compile traces this function."""


def _allocate(model: nn.Module) -> None:
    # `to_empty` cannot convert modules to fake tensors.
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="cpu"))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")


def _count(spec: RunSpec, micro_batches: int) -> dict[str, Work]:
    train = spec.train.model_copy(update={"micro_batches": micro_batches, "compile": False})
    model = planned_model(spec)
    counted_spec = spec.model_copy(update={"train": train, "cluster": ClusterSpec(), "model": model})
    device = torch.device("cpu")
    with (
        FakeTensorMode() as fake_mode,
        # Other threads than this one do not have the modes that count.
        torch.autograd.set_multithreading_enabled(False),
        # Fake tensors are on the CPU, because a CPU build of torch aborts in a backward on other devices. What depends
        # on the device is as on a GPU.
        mock.patch.dict(PRODUCT_ROWS, cpu=PRODUCT_ROWS["cuda"]),
        mock.patch.object(step, "unavailable_reason", return_value=None),
        mock.patch.object(triton, "unavailable_reason", _no_reason),
        mock.patch.object(step.Trainer, "_initialize_weights", lambda _, model: _allocate(model)),
    ):
        case = StepCase(counted_spec, device)
        trainer = case.trainer
        parts: dict[str, Work] = defaultdict(Work)
        if spec.train.compile:
            # The import of torch's compiler takes seconds.
            from mhmoe_ray.bench.acceptance.compiled import counting_backend

            torch._dynamo.reset()
            trainer.model.compile_blocks(backend=counting_backend(parts, fake_mode))
        accounting = StepAccounting(trainer.model)
        accounting.parts = parts
        with accounting, observed_parts(trainer.model, accounting):
            # The first update creates AdamW's moments.
            for _ in range(2):
                parts.clear()
                trainer.update(trainer.accumulate(case.batches))
    return parts
