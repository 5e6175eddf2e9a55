"""AdamW with moments in bfloat16, which are rounded stochastically.

Rounding to nearest would lose each change of a moment that is smaller than half a step between bfloat16 values.
Stochastic rounding goes up with the probability (distance from the lower neighbour / step), so that the mean of the
rounded values is the value. Weights and updates are float32.

The random bits are a hash of the run's seed, the parameter's name, the number of the update, and the value's position
in the full tensor. They depend neither on how tensors are sharded nor on restarts.

On a GPU, one kernel updates a tensor (`mhmoe_kernels.triton.adamw`). Elsewhere it is updated in pieces.
"""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from mhmoe_kernels import triton
from mhmoe_ray.model.held import local_shard

MOMENT_NAMES = ("exp_avg", "exp_avg_sq")  # AdamW's two moments in its state
PIECE_VALUES = 1 << 18
"""Values updated at a time: their float32 moments take little memory and stay in a CPU's cache."""
_GOLDEN_RATIO = -0x61C8864680B583EB
"""2^64 / golden ratio, rounded down to an odd number, signed. It spreads positions over 64 bits by multiplication."""


class ValuePosition(NamedTuple):
    """Position of this rank's values of a parameter, which decides the random bits."""

    name: str  # of the parameter
    offset: int  # of this rank's first value in the full tensor, counted in values


class RoundedAdamW(torch.optim.AdamW):
    """AdamW with stochastically rounded moments in bfloat16, which the first update creates."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        positions: Mapping[nn.Parameter, ValuePosition],
        seed: int,
        **options: Any,
    ) -> None:
        super().__init__(groups, **options)
        self._positions, self._seed = positions, seed

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # there is no closure, so no loss
        """Update all parameters that have gradients."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    # The host reads the number of updates, so it stays in CPU memory.
                    state["step"] = torch.zeros(())
                    state |= {name: torch.zeros_like(parameter, dtype=torch.bfloat16) for name in MOMENT_NAMES}
                self._update(parameter, state, group)

    def _update(self, parameter: nn.Parameter, state: dict[str, Any], group: dict[str, Any]) -> None:
        position = self._positions[parameter]
        updates = int(state["step"])
        key = _hash_key(self._seed, position.name, updates)
        tensors = (parameter, parameter.grad, *(state[name] for name in MOMENT_NAMES))
        shards = [local_shard(t).view(-1) for t in tensors]
        state["step"] += 1
        if triton.can_run(shards[0]):
            options = (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
            triton.rounded_adamw(*shards, position.offset, key, updates, *options)
            return
        pieces = zip(*(torch.split(shard, PIECE_VALUES) for shard in shards), strict=True)
        for i, (weight, gradient, *moments) in enumerate(pieces):
            wide_moments = mean, square = [moment.float() for moment in moments]
            adamw(
                [weight], [gradient], [mean], [square], [], [weight.new_full((), updates)],
                foreach=False, fused=True, amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1],
                lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
            )  # fmt: skip
            bits = random_bits(key, position.offset + i * PIECE_VALUES, len(weight), weight.device)
            for moment, wide_moment, shift in zip(moments, wide_moments, (0, 16), strict=True):
                moment.copy_(round_to_bfloat16(wide_moment, (bits >> shift) & 0xFFFF))


def round_to_bfloat16(values: Tensor, bits: Tensor) -> Tensor:
    """Return finite float32 values as bfloat16, each rounded at random to one of its two neighbours. A random int32 in
    0..65535 is added to the 16 bits that bfloat16 leaves out; an overflow rounds away from zero, and any other sum
    towards zero."""
    # The low 16 bits of the sum are 0 after the mask, so the conversion is exact.
    return ((values.view(torch.int32) + bits) & -0x10000).view(torch.float32).to(torch.bfloat16)


def random_bits(key: int, start: int, count: int, device: torch.device) -> Tensor:
    """Return 32 random bits (int32) for each position, which depend only on `key` and the position."""
    position = torch.arange(start, start + count, device=device, dtype=torch.int64)
    bits = ((position * _GOLDEN_RATIO) >> 32).to(torch.int32) ^ key
    # These are the constants of a 32-bit integer hash whose bits are almost free of bias (lowbias32 of the
    # hash-prospector project). Multiplication wraps around. The masks make the shifts logical ones.
    bits = (bits ^ ((bits >> 16) & 0xFFFF)) * 0x7FEB352D
    bits = (bits ^ ((bits >> 15) & 0x1FFFF)) * (0x846CA68B - (1 << 32))
    return bits ^ ((bits >> 16) & 0xFFFF)


def _hash_key(seed: int, name: str, update: int) -> int:
    digest = hashlib.blake2b(f"{seed} {name} {update}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little", signed=True)
