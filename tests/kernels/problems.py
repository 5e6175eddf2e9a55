"""Random rows, routes and experts, and the results of a backend on them."""

import torch

from mhmoe_kernels import ExpertWeights, Swiglu, run_experts

SWIGLU = Swiglu()


def problem(seed, n, d, f, e, k, dtype=torch.float64, only=None, function=SWIGLU, device="cpu"):
    """Return random rows, routes, gates and weights.

    `only` keeps the routes to the first few experts, so that others stay empty.
    """
    g = torch.Generator().manual_seed(seed)
    expert_NK = torch.rand(n, only or e, generator=g).topk(k, dim=-1).indices.to(device)

    def make(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(device, dtype).requires_grad_()

    if isinstance(function, Swiglu):
        stacked = (make(e, f, d), make(e, f, d), make(e, d, f))
    else:
        stacked = (make(e, f, d), make(e, f), make(e, f), make(e, f), make(e, d, f), make(e, d))
    return make(n, d), expert_NK, make(n, k), ExpertWeights(function, stacked)


def outputs_and_gradients(backend, x, expert, gate, weights):
    return with_gradients(run_experts(backend, x, expert, gate, weights), [x, gate, *weights.stacked])


def with_gradients(y, inputs):
    """Return y, and the gradients of a sum that weights its elements differently."""
    direction = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
    return y, *torch.autograd.grad((y * direction).sum(), inputs, materialize_grads=True)
