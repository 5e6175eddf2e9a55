"""Random rows, routes and experts, and the results of a backend on them."""

import torch

from mhmoe_kernels import ExpertWeights, Swiglu, run_experts

SWIGLU = Swiglu()


def make_problem(seed, n, d, f, e, k, dtype=torch.float64, n_used=None, function=SWIGLU, device="cpu"):
    """Return random rows, routes, gates and weights.

    Routes use the first `n_used` experts only, if it is given, so that the other experts get no rows.
    """
    generator = torch.Generator().manual_seed(seed)
    expert_NK = torch.rand(n, n_used or e, generator=generator).topk(k, dim=-1).indices.to(device)

    def make_tensor(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()

    if isinstance(function, Swiglu):
        stacked = (make_tensor(e, f, d), make_tensor(e, f, d), make_tensor(e, d, f))
    else:
        stacked = (
            make_tensor(e, f, d),
            make_tensor(e, f),
            make_tensor(e, f),
            make_tensor(e, f),
            make_tensor(e, d, f),
            make_tensor(e, d),
        )
    return make_tensor(n, d), expert_NK, make_tensor(n, k), ExpertWeights(function, stacked)


def outputs_and_gradients(backend, x, expert, gate, weights):
    return with_gradients(run_experts(backend, x, expert, gate, weights), [x, gate, *weights.stacked])


def with_gradients(y, inputs):
    """Return y, and the gradients of a sum of its elements with different weights."""
    direction = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
    return y, *torch.autograd.grad((y * direction).sum(), inputs, materialize_grads=True)
