"""Random inputs for the Triton kernels, and the errors of their results compared with `reference` in float64.

The kernels run on a GPU if there is one, else in Triton's interpreter. The interpreter truncates float32 to bfloat16
where a GPU rounds to nearest, so its bfloat16 errors are twice as large.
"""

from functools import partial

import torch

from mhmoe_kernels import ExpertWeights, GeluSubln, Swiglu, run_experts

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KINDS = {"swiglu": Swiglu(), "gelu": GeluSubln()}
# The values are the largest allowed ||ours - float64|| / ||float64|| for the same rounded inputs. Measured errors are
# 1e-6 for float32 and, in the interpreter, 1.5e-2 for bfloat16.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def make_problem(kind, seed, n, d, f, e, k, dtype=torch.float32, n_used=None):
    """Return random rows, expert ids and gates of each row, and the weights of `e` experts, as `problems.make_problem`
    does, but with some gates of 0, as dropped routes have, and with weights as small as initial ones."""
    generator = torch.Generator().manual_seed(seed)
    make_tensor = partial(torch.randn, generator=generator)
    if kind == "swiglu":
        stacked = (make_tensor(e, f, d) * d**-0.5, make_tensor(e, f, d) * d**-0.5, make_tensor(e, d, f) * f**-0.5)
    else:
        norm = (1 + 0.3 * make_tensor(e, f), 0.3 * make_tensor(e, f))
        stacked = (
            make_tensor(e, f, d) * d**-0.5,
            0.5 * make_tensor(e, f),
            *norm,
            make_tensor(e, d, f) * f**-0.5,
            0.3 * make_tensor(e, d),
        )
    expert_NK = torch.rand(n, n_used or e, generator=generator).topk(k, dim=-1).indices.to(DEVICE)
    gate_NK = (torch.rand(n, k, generator=generator) - 0.2).relu().to(DEVICE)
    x_ND, *stacked = ((t if dtype is None else t.to(dtype)).to(DEVICE) for t in (make_tensor(n, d), *stacked))
    return x_ND, expert_NK, gate_NK, ExpertWeights(KINDS[kind], tuple(stacked))


def outputs_and_gradients(function, x, expert, gate, weights):
    """Return the outputs of `function`, and the gradients of rows, gates and each weight for a weighted sum of them."""
    x, gate, *stacked = (t.detach().clone().requires_grad_() for t in (x, gate, *weights.stacked))
    y = function(x, expert, gate, weights._replace(stacked=tuple(stacked)))
    direction = torch.arange(y.numel(), device=y.device, dtype=torch.float64).sin().view_as(y).to(y.dtype)
    return y, *torch.autograd.grad((y * direction).sum(), [x, gate, *stacked], materialize_grads=True)


def largest_error(function, x, expert, gate, weights):
    """Return the largest relative error of the outputs of `function` and of each gradient, compared with `reference` in
    float64; NaN if one of them is."""
    results = outputs_and_gradients(function, x, expert, gate, weights)
    wide_weights = ExpertWeights(weights.function, tuple(w.double() for w in weights.stacked))
    expected = outputs_and_gradients(partial(run_experts, "reference"), x.double(), expert, gate.double(), wide_weights)
    assert [t.dtype for t in results] == [x.dtype, x.dtype, gate.dtype, *(w.dtype for w in weights.stacked)]
    pairs = [(a.detach().double(), b.detach()) for a, b in zip(results, expected, strict=True)]
    return float(torch.stack([(a - b).norm() / b.norm().clamp(min=1e-12) for a, b in pairs]).max())
