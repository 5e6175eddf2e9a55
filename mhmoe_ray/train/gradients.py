"""Making gradients whole over ranks, and clipping them by their global norm."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.model.feedforward import Experts
from mhmoe_ray.train.mesh import Mesh


def expert_parameters(model: Decoder) -> dict[str, nn.Parameter]:
    """The parameters that expert parallelism spreads over ranks, by name."""
    return {
        f"{module_name}.{name}": parameter
        for module_name, module in model.named_modules()
        if isinstance(module, Experts)
        for name, parameter in module.named_parameters()
    }


def reduce_expert_gradients(model: Decoder, mesh: Mesh) -> None:
    """Sum over dp, divide by dp * ep: a rank's experts already hold what all ep ranks of its group sent them."""
    if mesh.world == 1:
        return
    for parameter in expert_parameters(model).values():
        if parameter.grad is None:  # no row in any micro-batch of the step
            parameter.grad = torch.zeros_like(parameter)
        if isinstance(parameter, DTensor):
            continue  # FSDP did so
        if mesh.dp > 1:
            dist.all_reduce(parameter.grad, group=mesh.dp_group)
        parameter.grad /= mesh.world


def clip_gradients(model: Decoder, mesh: Mesh, clip_norm: float) -> float:
    """Scale all gradients so that their norm over all parameters and experts is at most `clip_norm`.

    Returns the norm before clipping; the same number on every rank.
    """
    experts = expert_parameters(model)
    everywhere: list[Tensor] = []  # the same on every rank
    by_ep: list[Tensor] = []  # other ep ranks have others, dp ranks the same
    sliced: list[Tensor] = []  # each rank has its own
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        if isinstance(parameter.grad, DTensor):
            sliced.append(parameter.grad.to_local())
        else:
            (by_ep if name in experts else everywhere).append(parameter.grad)
    device = next(model.parameters()).device
    squares = torch.stack([_square_sum(grads, device) for grads in (everywhere, by_ep, sliced)])
    if mesh.ep > 1:
        dist.all_reduce(squares[1], group=mesh.ep_group)
    if sliced:
        dist.all_reduce(squares[2])
    norm = float(squares.sum().sqrt())
    # Scaling cannot mend a norm that is not finite; the caller must look.
    if clip_norm < norm < float("inf"):
        torch._foreach_mul_(everywhere + by_ep + sliced, clip_norm / norm)
    return norm


def _square_sum(grads: list[Tensor], device: torch.device) -> Tensor:
    if not grads:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(grads)).double().square().sum()
