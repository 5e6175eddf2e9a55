"""Feed-forward parts: the dense layer and the stack of experts, which compute the same function."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mhmoe_kernels import ExpertWeights, choose, run_experts
from mhmoe_ray.model.architectures import modules_of
from mhmoe_ray.model.held import local
from mhmoe_ray.model.router import Routing
from mhmoe_ray.spec import ModelSpec

Dispatch = Callable[[Tensor, Routing, "Experts"], Tensor]
"""Brings routed rows to their experts and the combined outputs back: (x_ND, routing, experts) -> y_ND."""


class FeedForward(nn.Module):
    """A dense layer on whole tokens."""

    def __init__(self, spec: ModelSpec, hidden: int) -> None:
        super().__init__()
        modules = modules_of(spec)
        self.function = modules.function(spec)
        for name, shape in modules.expert_shapes(spec.d_model, hidden).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    def forward(self, x_BTM: Tensor) -> Tensor:
        return self.function(*_for_autocast(x_BTM, tuple(self.parameters())))


def matrices(model: nn.Module) -> set[str]:
    """Names of the parameters that are matrices; of experts, which are stacked, those that are one for each expert."""
    return {
        name
        for path, module in model.named_modules()
        for name, parameter in module.named_parameters(path, recurse=False)
        if parameter.ndim - isinstance(module, Experts) >= 2
    }


class Experts(nn.Module):
    """The experts `held` of a layer's E; all of them unless expert parallelism spreads them over ranks.

    Each is a FeedForward of width d/h and hidden width f. Its parameters are stacked along a first dimension E, in the
    order of its function.
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
        """Rows through all experts of the layer, wherever they are. A forward pass of this module, so that training can
        bring its parameters together for as long as it lasts."""
        return dispatch(x_ND, routing, self)

    def compute(self, x_ND: Tensor, expert_NK: Tensor, gate_NK: Tensor, places: int | None = None) -> Tensor:
        """Rows through the experts held here, which are numbered from 0.

        Args:
            x_ND, expert_NK, gate_NK: as `mhmoe_kernels.run_experts`.
            places: rows that an expert takes at most; None where nothing is dropped, as in serving.
        """
        x_ND, weights = self.cast(x_ND)
        return run_experts(self.backend(x_ND, weights, places), x_ND, expert_NK, gate_NK, weights, places)

    def backend(self, x_ND: Tensor, weights: ExpertWeights, places: int | None = None) -> str:
        """The kernel that rows like `x_ND`, which are cast, go through."""
        return choose(self.kernel, x_ND, weights, places)

    def cast(self, x_ND: Tensor) -> tuple[Tensor, ExpertWeights]:
        """Rows and the experts held here, in autocast's dtype where it is on."""
        # Where training slices experts over ranks, these are DTensors of what this rank holds.
        x_ND, *stacked = _for_autocast(x_ND, tuple(local(p) for p in self.parameters()))
        return x_ND, ExpertWeights(self.function, tuple(stacked), self.recompute)


def _for_autocast(x: Tensor, weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Autocast sees single operations; here a whole expert is one."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, *weights
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(t.to(dtype) for t in (x, *weights))
