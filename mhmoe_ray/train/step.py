"""One optimizer step: M micro-batches over all ranks, one update. Knows nothing of Ray or of files."""

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mhmoe_kernels import choose
from mhmoe_ray.errors import JobError, SpecError
from mhmoe_ray.model.balance import moved_bias
from mhmoe_ray.model.decoder import Decoder, Output, routing_loss, token_losses
from mhmoe_ray.model.init import init_weights
from mhmoe_ray.model.noise import Noise
from mhmoe_ray.planner.units import compute_bytes
from mhmoe_ray.spec import RunSpec
from mhmoe_ray.train.dispatch import ExpertParallelDispatch, Sent, least_sent
from mhmoe_ray.train.gradients import clip_gradients, reduce_expert_gradients, replicate
from mhmoe_ray.train.mesh import Mesh
from mhmoe_ray.train.optimizer import build_optimizer, learning_rate, set_learning_rate


class RankSums(NamedTuple):
    """What this rank's micro-batches of a step add up to."""

    loss: float
    """Nats, summed over tokens."""
    balance: float
    """Balance loss summed over micro-batches and layers."""
    dropped: int
    """Routes that found no place, over all layers."""
    count_LE: Tensor
    """Kept routes per layer and expert, int64."""
    sent: Sent = Sent()
    """Bytes that expert-parallel dispatch sent to other ranks."""
    least_sent: int = 0
    """Below which `sent.rows`, summed over ranks, cannot be; bytes."""


class Trainer:
    """Model, optimizer and mesh of one rank."""

    def __init__(self, spec: RunSpec, mesh: Mesh, device: torch.device) -> None:
        self.spec, self.mesh, self.device = spec, mesh, device
        moe = spec.model.moe
        if moe:
            _, reason = choose(moe.kernel, device, spec.model.d_model // moe.heads)
            if reason:
                raise SpecError(f"model.moe.kernel {moe.kernel}", reason, "install what it needs, or set it to auto")
        self.model = Decoder(spec.model, mesh.held(moe.experts) if moe else None)
        init_weights(self.model, spec.seed)
        self.model.to(device)
        self._dispatch = ExpertParallelDispatch(mesh.group("ep")) if mesh.ep > 1 else None
        if self._dispatch:
            for layer in self.model.moe_layers():
                layer.dispatch = self._dispatch
        self.replica: nn.Module = replicate(self.model, mesh)
        self.optimizer = build_optimizer(self.model, spec.train)
        self.step = 0

    def accumulate(self, batches: Iterable[Tensor]) -> RankSums:
        """Add the gradients of this rank's micro-batches and make them whole over ranks, unclipped.

        Args:
            batches: M / world tensors of token ids, (b, T + 1) int64 on the device.
        """
        spec, m = self.spec, self.spec.train.micro_batches
        here = m // self.mesh.world
        moe = spec.model.moe
        sums = RankSums(0.0, 0.0, 0, self.zero_counts())
        if self._dispatch:
            self._dispatch.sent = Sent()
        for i, token_BT in enumerate(batches, start=1):
            with self._synchronise_on(i == here):
                micro_batch = self.step * m + self.mesh.rank + (i - 1) * self.mesh.world
                output = self.forward(token_BT[:, :-1], Noise(spec.seed, micro_batch))
                loss_BT = token_losses(output.logits_BTV, token_BT[:, 1:])
                objective = loss_BT.mean()
                balance, dropped = 0.0, 0
                if moe:
                    objective = objective + routing_loss(spec.model, output.routing)
                    balance = sum(r.balance_loss.item() for r in output.routing)
                    dropped = sum(int(r.dropped) for r in output.routing)
                    sums.count_LE.add_(torch.stack([r.count_E for r in output.routing]).cpu())
                # DDP and `reduce_expert_gradients` divide by the world; the mean wanted is over the step's M.
                torch.autograd.backward(objective * (self.mesh.world / m))
            sums = sums._replace(
                loss=sums.loss + loss_BT.sum().item(), balance=sums.balance + balance, dropped=sums.dropped + dropped
            )
        reduce_expert_gradients(self.model, self.mesh)
        if moe and moe.bias_rate:
            self._move_biases(sums.count_LE, moe.bias_rate)
        if moe and self._dispatch:
            row_bytes = spec.model.d_model // moe.heads * compute_bytes(spec)
            least = least_sent(sums.count_LE, self.mesh.held(moe.experts), row_bytes)
            sums = sums._replace(sent=self._dispatch.sent, least_sent=least)
        return sums

    def zero_counts(self) -> Tensor:
        """count_LE without any route."""
        moe = self.spec.model.moe
        return torch.zeros(self.spec.model.moe_layers, moe.experts if moe else 0, dtype=torch.int64)

    def _move_biases(self, own_count_LE: Tensor, rate: float) -> None:
        """By the routes of the whole step, so that a bias is the same on any number of ranks."""
        count_LE = own_count_LE.to(self.device, copy=True)
        if self.mesh.world > 1:
            dist.all_reduce(count_LE)
        for layer, count_E in zip(self.model.moe_layers(), count_LE, strict=True):
            layer.router.bias_E.copy_(moved_bias(layer.router.bias_E, count_E, rate))

    def update(self) -> tuple[float, float]:
        """Clip and apply the accumulated gradients; returns (gradient norm before clipping, learning rate).

        Raises:
            JobError: the norm is not finite, on all ranks alike; nothing is applied.
        """
        norm = clip_gradients(self.model, self.mesh, self.spec.train.clip_norm)
        if not math.isfinite(norm):
            why = f"the gradient of step {self.step + 1} is not finite (norm {norm})"
            raise JobError("training", why, "submit again with a lower train.lr or longer warm-up")
        self.step += 1
        lr = learning_rate(self.spec.train, self.step)
        set_learning_rate(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm, lr

    def forward(self, token_BT: Tensor, noise: Noise | None = None) -> Output:
        dtype = torch.bfloat16
        enabled = self.spec.train.precision == "bfloat16"
        with torch.autocast(self.device.type, dtype, enabled=enabled):
            output: Output = (self.replica if torch.is_grad_enabled() else self.model)(token_BT, noise=noise)
        return output

    @torch.no_grad()
    def validate(self, token_NT: Tensor, counts_NT: Tensor) -> tuple[float, int]:
        """Mean loss in nats over the held-out tokens, and their number; the same on every rank.

        Args:
            token_NT: all held-out samples, (N, T + 1); every rank passes the same.
            counts_NT: which targets count, (N, T) bool.
        """
        b, world = self.spec.train.micro_batch_size, self.mesh.world
        rounds = -(-len(token_NT) // (b * world))
        missing = rounds * b * world - len(token_NT)
        # Rows of no weight, so that every rank takes part in every exchange of rows.
        token_NT = torch.cat([token_NT, token_NT[:1].expand(missing, -1)])
        counts_NT = torch.cat([counts_NT, counts_NT.new_zeros(missing, counts_NT.shape[1])])
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        for i in range(rounds):
            start = (i * world + self.mesh.rank) * b
            token_BT, weight_BT = token_NT[start : start + b].to(self.device), counts_NT[start : start + b]
            weight_BT = weight_BT.to(self.device)
            loss_BT = token_losses(self.forward(token_BT[:, :-1]).logits_BTV, token_BT[:, 1:])
            total += torch.stack([(loss_BT * weight_BT).sum(dtype=torch.float64), weight_BT.sum(dtype=torch.float64)])
        if world > 1:
            dist.all_reduce(total)
        return float(total[0] / total[1]), int(total[1])

    def _synchronise_on(self, last: bool) -> AbstractContextManager[None]:
        """Ranks exchange gradients once a step, in the backward pass of the last micro-batch."""
        if isinstance(self.replica, DistributedDataParallel) and not last:
            return self.replica.no_sync()
        return nullcontext()
