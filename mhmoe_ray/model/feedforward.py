"""Feed-forward modules: the dense layer and the stack of experts, which compute the same function."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mhmoe_kernels import ExpertWeights, choose, run_experts
from mhmoe_ray.model.architectures import modules_of
from mhmoe_ray.model.held import local
from mhmoe_ray.model.router import Routing
from mhmoe_ray.spec import ModelSpec

Dispatch = Callable[[Tensor, Routing, "Experts"], Tensor]
"""Function that sends routed rows to their experts and returns the combined outputs: (x_ND, routing, experts) ->
y_ND."""


class FeedForward(nn.Module):
    """Dense feed-forward layer on whole tokens."""

    def __init__(self, spec: ModelSpec, hidden: int) -> None:
        super().__init__()
        modules = modules_of(spec)
        self.function = modules.function(spec)
        for name, shape in modules.expert_shapes(spec.d_model, hidden).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    def forward(self, x_BTM: Tensor) -> Tensor:
        return self.function(*_for_autocast(x_BTM, tuple(self.parameters())))


def matrices(model: nn.Module) -> set[str]:
    """Return the names of the parameters that are matrices, counting an expert's parameter without its stack
    dimension."""
    return {
        name
        for path, module in model.named_modules()
        for name, parameter in module.named_parameters(path, recurse=False)
        if parameter.ndim - isinstance(module, Experts) >= 2
    }


class Experts(nn.Module):
    """The experts `held` out of a layer's E: all of them, unless expert parallelism spreads them over ranks.

    Each expert is a FeedForward of width d/h and hidden width f. Its parameters are stacked along a first dimension E,
    in the order of its function's arguments.
    """

    def __init__(self, spec: ModelSpec, held: range) -> None:
        super().__init__()
        moe = spec.moe
        assert moe is not None
        self.held, self.recompute = held, spec.recomputes
        self.kernel: str = moe.kernel
        modules = modules_of(spec)
        self.function = modules.function(spec)
        for name, shape in modules.expert_shapes(spec.d_model // moe.heads, moe.d_expert).items():
            first, _, letters = name.rpartition("_")
            self.register_parameter(f"{first}_E{letters}", nn.Parameter(torch.empty(len(held), *shape)))

    def forward(self, x_ND: Tensor, routing: Routing, dispatch: Dispatch) -> Tensor:
        """Run rows through all experts of the layer, on whichever rank they are.

        This is a forward pass of the module, so that training can gather its sharded parameters for the duration of the
        call.
        """
        return dispatch(x_ND, routing, self)

    def compute(self, x_ND: Tensor, expert_NK: Tensor, gate_NK: Tensor, places: int | None = None) -> Tensor:
        """Run rows through the experts held here, which are numbered from 0.

        Args:
            x_ND, expert_NK, gate_NK: rows and routes as in `mhmoe_kernels.run_experts`.
            places: expert capacity, the most rows that one expert takes; None if nothing is dropped, as in serving.
        """
        x_ND, weights = self.cast(x_ND)
        return run_experts(self.backend(x_ND, weights, places), x_ND, expert_NK, gate_NK, weights, places)

    def backend(self, x_ND: Tensor, weights: ExpertWeights, places: int | None = None) -> str:
        """Return the name of the kernel for rows like `x_ND`, after the cast to the compute dtype."""
        return choose(self.kernel, x_ND, weights, places)

    def cast(self, x_ND: Tensor) -> tuple[Tensor, ExpertWeights]:
        """Return rows and the weights of the experts held here, in autocast's dtype where autocast is on."""
        # Where training slices experts over ranks, these are DTensors of what this rank holds.
        x_ND, *stacked = _for_autocast(x_ND, tuple(local(p) for p in self.parameters()))
        return x_ND, ExpertWeights(self.function, tuple(stacked), self.recompute)


def _for_autocast(x: Tensor, weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Cast rows and weights to autocast's dtype, if it is on. Autocast acts on single operations, but here a whole
    expert is one operation."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, *weights
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(t.to(dtype) for t in (x, *weights))
