"""Random inputs for kernels, and a kernel's outputs and gradients for them."""

import torch

from mhmoe_kernels import ExpertWeights, Gelu, Swiglu, run_experts

SWIGLU = Swiglu()


def make_problem(seed, n, d, f, e, k, dtype=torch.float64, n_used=None, function=SWIGLU, device="cpu"):
    """Return `n` random rows of width `d`, the ids of `k` experts for each row, their gates, and the weights of `e`
    experts of hidden width `f`.

    If `n_used` is given, only the first `n_used` experts are chosen, and the others get no rows. `function` is the kind
    of expert.
    """
    generator = torch.Generator().manual_seed(seed)
    expert_NK = torch.rand(n, n_used or e, generator=generator).topk(k, dim=-1).indices.to(device)

    def make_tensor(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()

    if isinstance(function, Swiglu):
        stacked = (make_tensor(e, f, d), make_tensor(e, f, d), make_tensor(e, d, f))
    else:
        vectors = [make_tensor(e, f) for _ in range(1 if isinstance(function, Gelu) else 3)]
        stacked = (make_tensor(e, f, d), *vectors, make_tensor(e, d, f), make_tensor(e, d))
    return make_tensor(n, d), expert_NK, make_tensor(n, k), ExpertWeights(function, stacked)


def outputs_and_gradients(backend, x, expert, gate, weights):
    """Return a backend's outputs, and the gradients that `with_gradients` computes for rows, gates and each weight."""
    return with_gradients(run_experts(backend, x, expert, gate, weights), [x, gate, *weights.stacked])


def with_gradients(y, inputs):
    """Return y, and for each tensor of `inputs` its gradient for a weighted sum of y's elements; the weights go from -1
    to 1. An input that y does not depend on has a gradient of zeros."""
    direction = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
    return y, *torch.autograd.grad((y * direction).sum(), inputs, materialize_grads=True)
