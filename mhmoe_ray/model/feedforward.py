"""Feed-forward parts: the backbone's dense layer, its norm, and the stack of experts, which are the same function."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mhmoe_kernels import ExpertWeights, Function, GeluSubln, Swiglu, choose, run_experts
from mhmoe_ray.model.held import local
from mhmoe_ray.model.router import Routing
from mhmoe_ray.spec import ModelSpec

Dispatch = Callable[[Tensor, Routing, "Experts"], Tensor]
"""Brings routed rows to their experts and the combined outputs back: (x_ND, routing, experts) -> y_ND."""


def make_norm(spec: ModelSpec) -> nn.Module:
    """The backbone's norm over d."""
    return (nn.RMSNorm if spec.backbone == "llama" else nn.LayerNorm)(spec.d_model, spec.norm_eps)


def _function(spec: ModelSpec) -> Function:
    return Swiglu() if spec.backbone == "llama" else GeluSubln(spec.norm_eps)


class FeedForward(nn.Module):
    """A dense layer on whole tokens: SwiGLU without biases (llama), or GELU with biases and an inner norm (subln)."""

    def __init__(self, spec: ModelSpec, hidden: int) -> None:
        super().__init__()
        d = spec.d_model
        self.function = _function(spec)
        if spec.backbone == "llama":
            self.gate_FD = nn.Parameter(torch.empty(hidden, d))
            self.up_FD = nn.Parameter(torch.empty(hidden, d))
            self.down_DF = nn.Parameter(torch.empty(d, hidden))
        else:
            self.fc1_FD = nn.Parameter(torch.empty(hidden, d))
            self.fc1_bias_F = nn.Parameter(torch.empty(hidden))
            self.norm_weight_F = nn.Parameter(torch.empty(hidden))
            self.norm_bias_F = nn.Parameter(torch.empty(hidden))
            self.fc2_DF = nn.Parameter(torch.empty(d, hidden))
            self.fc2_bias_D = nn.Parameter(torch.empty(d))

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

    Each is a FeedForward of width d/h and hidden width f; parameters are stacked, in the order of its function.
    """

    def __init__(self, spec: ModelSpec, held: range) -> None:
        super().__init__()
        moe = spec.moe
        assert moe is not None
        self.held, self.recompute = held, spec.recomputes
        self.kernel: str = moe.kernel
        self.function = _function(spec)
        E, D, F = len(held), spec.d_model // moe.heads, moe.d_expert
        if spec.backbone == "llama":
            self.gate_EFD = nn.Parameter(torch.empty(E, F, D))
            self.up_EFD = nn.Parameter(torch.empty(E, F, D))
            self.down_EDF = nn.Parameter(torch.empty(E, D, F))
        else:
            self.fc1_EFD = nn.Parameter(torch.empty(E, F, D))
            self.fc1_bias_EF = nn.Parameter(torch.empty(E, F))
            self.norm_weight_EF = nn.Parameter(torch.empty(E, F))
            self.norm_bias_EF = nn.Parameter(torch.empty(E, F))
            self.fc2_EDF = nn.Parameter(torch.empty(E, D, F))
            self.fc2_bias_ED = nn.Parameter(torch.empty(E, D))

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
