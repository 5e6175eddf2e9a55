"""Feed-forward modules: the dense layer and the stack of experts. Both compute the same function of a row."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from mhmoe_kernels import ExpertWeights, Function, choose_kernel, run_experts
from mhmoe_ray.model.architectures import modules_of
from mhmoe_ray.model.autocast import cast_for_autocast
from mhmoe_ray.model.held import local_shard
from mhmoe_ray.model.router import Routing
from mhmoe_ray.spec import ModelSpec

if TYPE_CHECKING:
    from mhmoe_ray.model.adapter import ModuleAdapter


class CastingModule(nn.Module):
    """Module that casts its parameters itself, because autocast skips custom operations."""

    function: Function
    adapter: "ModuleAdapter | None" = None

    def __init__(self) -> None:
        super().__init__()
        self.step_casts: tuple[Tensor, ...] | None = None  # parameters, cast once for all micro-batches of a step

    def cast_weights(self) -> tuple[Tensor, ...]:
        """Return all parameters, in order, in autocast's dtype if autocast is on."""
        # Parameters are DTensors if training shards experts over ranks.
        return cast_for_autocast(*(local_shard(p) for p in self.parameters()))

    def cast(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return rows and all parameters in autocast's dtype if it is on."""
        # All micro-batches of a step can share one cast of each weight. Several backwards can pass through it, because
        # a cast saves no tensors that the first backward would free.
        weights = self.step_casts if torch.is_grad_enabled() else None
        return *cast_for_autocast(x), *(weights or self.cast_weights())


class FeedForward(CastingModule):
    """Dense feed-forward layer on whole tokens."""

    def __init__(self, spec: ModelSpec, hidden: int) -> None:
        super().__init__()
        modules = modules_of(spec)
        self.function = modules.function(spec)
        for name, shape in modules.expert_shapes(spec.d_model, hidden).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    def forward(self, x_BTM: Tensor) -> Tensor:
        return self.function(*self.cast(x_BTM))


class SharedExpert(NamedTuple):
    """Shared expert with its input, to be computed while rows travel."""

    layer: FeedForward
    x_BTM: Tensor  # whole tokens, before they are split into sub-tokens


def matrix_names(model: nn.Module) -> set[str]:
    """Return the names of all matrices and stacks of matrices, without biases and norms."""
    return {
        name
        for path, module in model.named_modules()
        for name, parameter in module.named_parameters(path, recurse=False)
        if parameter.ndim - isinstance(module, Experts) >= 2
    }


class Experts(CastingModule):
    """The experts of a layer that this process holds: all E experts, or some of them with expert parallelism.

    Each computes the function of `FeedForward`, with a sub-token's width D and hidden width F. Parameters are stacked
    along a first dimension E, and registered in the order of the function's arguments.
    """

    def __init__(self, spec: ModelSpec, expert_ids: range) -> None:
        super().__init__()
        moe = spec.moe
        assert moe is not None
        self.expert_ids, self.recompute = expert_ids, spec.recomputed_share
        self.kernel: str = moe.kernel
        modules = modules_of(spec)
        self.function = modules.function(spec)
        for name, shape in modules.expert_shapes(spec.row_width, moe.d_expert).items():
            base_name, _, dimensions = name.rpartition("_")
            self.register_parameter(f"{base_name}_E{dimensions}", nn.Parameter(torch.empty(len(expert_ids), *shape)))

    def forward(
        self, x_ND: Tensor, routing: Routing, dispatch: "Dispatch", shared: SharedExpert | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the result of `dispatch`, maybe with outputs of other ranks' experts."""
        # The dispatch, which sends rows to their experts, runs inside a forward of this module, because FSDP gathers
        # the module's sharded parameters only during its forward.
        return dispatch(x_ND, routing, self, shared)

    def compute(self, x_ND: Tensor, expert_NK: Tensor, gate_NK: Tensor, capacity: int | None = None) -> Tensor:
        """Return each row's weighted sum of outputs; `expert_NK` counts from this process's first expert."""
        x_ND, weights = self.cast_rows(x_ND)
        return run_experts(self.select_kernel(x_ND, weights, capacity), x_ND, expert_NK, gate_NK, weights, capacity)

    def select_kernel(self, x_ND: Tensor, weights: ExpertWeights, capacity: int | None = None) -> str:
        """Return the kernel's name for results of `cast_rows`; kernel `capacity` needs a capacity, in rows."""
        return choose_kernel(self.kernel, x_ND, weights, capacity)

    def cast_rows(self, x_ND: Tensor) -> tuple[Tensor, ExpertWeights]:
        """Return rows and weights, both in autocast's dtype if it is on."""
        x_ND, *stacked = self.cast(x_ND)
        return x_ND, ExpertWeights(self.function, tuple(stacked), self.recompute)


Dispatch = Callable[[Tensor, Routing, Experts, SharedExpert | None], tuple[Tensor, Tensor | None]]
"""Function (x_ND, routing, experts, shared) -> (y_ND, y_BTM) that sends routed rows to their experts, and returns the
combined outputs and those of the shared expert, if any."""
