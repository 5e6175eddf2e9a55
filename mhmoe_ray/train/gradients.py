"""Making gradients whole over ranks, and clipping them by their global norm."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

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


def replicate(model: Decoder, mesh: Mesh) -> nn.Module:
    """DDP around everything but the experts, whose gradients `reduce_expert_gradients` makes whole."""
    if mesh.world == 1:
        return model
    ignore = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    ignore(model, list(expert_parameters(model)))  # type: ignore[no-untyped-call]
    return DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)


def reduce_expert_gradients(model: Decoder, mesh: Mesh) -> None:
    """Sum over dp, divide by dp * ep: a rank's experts already hold what all ep ranks of its group sent them."""
    if mesh.world == 1:
        return
    for parameter in expert_parameters(model).values():
        if parameter.grad is None:  # no row in any micro-batch of the step
            parameter.grad = torch.zeros_like(parameter)
        if mesh.dp > 1:
            dist.all_reduce(parameter.grad, group=mesh.group("dp"))
        parameter.grad /= mesh.world


def clip_gradients(model: Decoder, mesh: Mesh, clip_norm: float) -> float:
    """Scale all gradients so that their norm over all parameters and experts is at most `clip_norm`.

    Returns the norm before clipping; the same number on every rank.
    """
    experts = expert_parameters(model)
    others = [p for name, p in model.named_parameters() if name not in experts]
    square = _square_sum(experts.values(), like=others[0])
    if mesh.ep > 1:
        dist.all_reduce(square, group=mesh.group("ep"))
    norm = float((square + _square_sum(others, like=others[0])).sqrt())
    # Scaling cannot mend a norm that is not finite; the caller must look.
    if clip_norm < norm < float("inf"):
        torch._foreach_mul_([p.grad for p in model.parameters() if p.grad is not None], clip_norm / norm)
    return norm


def _square_sum(parameters: Iterable[nn.Parameter], like: Tensor) -> Tensor:
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros((), dtype=torch.float64, device=like.device)
    return torch.stack(torch._foreach_norm(grads)).double().square().sum()
