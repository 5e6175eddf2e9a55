"""Gradients of a step: the reduction of experts' gradients over ranks during the last backward, and clipping."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mhmoe_ray.distributed.mesh import Mesh
from mhmoe_ray.distributed.optimizer import expert_parameters
from mhmoe_ray.model.feedforward import Experts
from mhmoe_ray.model.held import is_dtensor
from mhmoe_ray.model.trunk import Trunk


class ExpertReduction:
    """Reduction of the gradients of experts that FSDP does not shard: a sum over expert_dp, divided by the world size.

    In a step's last backward, the all-reduce of a layer's bucket starts as soon as its gradients are complete, beside
    the backward of lower layers. Buckets start in the same order on all ranks, from the highest layer down.
    """

    def __init__(self, model: Trunk, mesh: Mesh) -> None:
        self._mesh = mesh
        trained_experts = [p for p in expert_parameters(model).values() if p.requires_grad]
        self._parameters = trained_experts if mesh.world_size > 1 else []
        layers = [m for m in model.modules() if isinstance(m, Experts)]
        # FSDP itself sums and divides the gradients of sharded experts.
        buckets = [
            [p for p in layer.parameters() if p.requires_grad and not is_dtensor(p)] for layer in reversed(layers)
        ]
        self._buckets = [bucket for bucket in buckets if bucket] if mesh.world_size > 1 else []
        self._complete: set[nn.Parameter] = set()  # parameters whose gradients of this step are complete
        self._works: list[dist.Work] = []
        self._started_count = 0  # buckets whose all-reduces have started in this step
        self.is_last_backward = False  # whether the next backward is the last one of the step
        if mesh.expert_dp > 1:
            for bucket in self._buckets:
                for parameter in bucket:
                    # torch's method has no annotations.
                    parameter.register_post_accumulate_grad_hook(self._complete_gradient)  # type: ignore[no-untyped-call]

    def _complete_gradient(self, parameter: nn.Parameter) -> None:
        """Note a complete gradient, and start the all-reduces of complete buckets in turn."""
        if not self.is_last_backward:
            return
        self._complete.add(parameter)
        while self._started_count < len(self._buckets) and self._complete.issuperset(
            self._buckets[self._started_count]
        ):
            self._start_next()

    def _start_next(self) -> None:
        for parameter in self._buckets[self._started_count]:
            assert parameter.grad is not None
            work = dist.all_reduce(parameter.grad, group=self._mesh.group("expert_dp"), async_op=True)
            assert work is not None
            self._works.append(work)
        self._started_count += 1

    def finish(self) -> None:
        """Complete the reduction of all experts' gradients; an expert without one gets zeros."""
        for parameter in self._parameters:
            # If a rank's experts got no row in any micro-batch of the step, they may have no gradient, but the
            # all-reduce needs a tensor from every rank.
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self._mesh.expert_dp > 1:
            while self._started_count < len(self._buckets):
                self._start_next()
        for work in self._works:
            work.wait()
        for bucket in self._buckets:
            for parameter in bucket:
                assert parameter.grad is not None
                parameter.grad /= self._mesh.world_size
        self._works.clear()
        self._complete.clear()
        self._started_count = 0


def clip_gradients(model: Trunk, mesh: Mesh, clip_norm: float) -> float:
    """Scale all gradients in place to a global norm of at most `clip_norm`, and return the norm before, equal on all
    ranks. Gradients whose norm is not finite stay as they are."""
    experts = expert_parameters(model)
    # The norm must count each value once, so gradients are split into three kinds: replicated ones are the same on
    # every rank, those of experts differ between ep ranks only, and sharded ones differ on every rank.
    replicated: list[Tensor] = []
    per_ep_rank: list[Tensor] = []
    sharded: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        if is_dtensor(parameter.grad):
            sharded.append(parameter.grad.to_local())
        else:
            (per_ep_rank if name in experts else replicated).append(parameter.grad)
    device = next(model.parameters()).device
    squares = torch.stack([_square_sum(grads, device) for grads in (replicated, per_ep_rank, sharded)])
    if mesh.ep > 1:
        dist.all_reduce(squares[1], group=mesh.group("ep"))
    if sharded:
        dist.all_reduce(squares[2])
        # With hybrid sharding, several ranks hold the same shard.
        squares[2] /= mesh.replicas
    norm = float(squares.sum().sqrt())
    # Scaling cannot repair gradients whose norm is not finite, so they stay as they are and the caller must check the
    # norm.
    if clip_norm < norm < float("inf"):
        torch._foreach_mul_(replicated + per_ep_rank + sharded, clip_norm / norm)
    return norm


def _square_sum(gradients: list[Tensor], device: torch.device) -> Tensor:
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(gradients)).double().square().sum()
