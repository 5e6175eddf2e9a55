"""Which experts tokens go to, counted while a model computes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mhmoe_ray.evaluate.counts import RoutingCounts
from mhmoe_ray.model.decoder import Decoder
from mhmoe_ray.model.router import Routing


class Collector:
    """Counts the routes of a decoder's forward passes, by domain."""

    def __init__(self, model: Decoder) -> None:
        """Args:
        model: with experts.
        """
        moe = model.spec.moe
        assert moe is not None
        self._moe, self._layers = moe, model.moe_layers()
        self._kept: dict[str, _Counts] = {}
        self._real_N: Tensor | None = None
        self._current: _Counts | None = None

    @contextmanager
    def counting(self, domain: str, real_BT: Tensor) -> Iterator[None]:
        """Args:
        domain: that the tokens of the forward pass within belong to.
        real_BT: which of them count.
        """
        shape = len(self._layers), self._moe.experts, self._moe.heads, self._moe.top_k
        self._current = self._kept.setdefault(domain, _Counts.empty(*shape))
        self._real_N = real_BT.flatten()
        self._current.tokens += int(self._real_N.sum())
        handles = [layer.router.register_forward_hook(self._hook(number)) for number, layer in enumerate(self._layers)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, layer: int) -> Any:
        def count(_: nn.Module, __: Any, routing: Routing) -> None:
            assert self._current is not None
            assert self._real_N is not None
            h = self._moe.heads
            expert_NHK = routing.expert_NK.view(-1, h, self._moe.top_k)[self._real_N]
            gate_NHK = routing.gate_NK.view_as(routing.expert_NK).view(-1, h, self._moe.top_k)[self._real_N]
            self._current.add(layer, expert_NHK, gate_NHK)

        return count

    def result(self) -> dict[str, RoutingCounts]:
        return {domain: counts.plain() for domain, counts in self._kept.items()}


class _Counts:
    def __init__(self, counts_LE: Tensor, distinct_LR: Tensor, agreement_LHH: Tensor) -> None:
        self.tokens = 0
        self.counts_LE, self.tokens_LE = counts_LE, counts_LE.clone()
        self.distinct_LR, self.agreement_LHH = distinct_LR, agreement_LHH
        self.first_weight_L = torch.zeros(len(counts_LE), dtype=torch.float64)

    @classmethod
    def empty(cls, layers: int, experts: int, heads: int, top_k: int) -> "_Counts":
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(layers, *shape, dtype=torch.int64)

        return cls(zeros(experts), zeros(heads * top_k + 1), zeros(heads, heads))

    def add(self, layer: int, expert_NHK: Tensor, gate_NHK: Tensor) -> None:
        experts = self.counts_LE.shape[1]
        self.counts_LE[layer] += expert_NHK.flatten().bincount(minlength=experts).cpu()
        of_token_NR = expert_NHK.flatten(1).sort(1).values
        is_new_NR = torch.ones_like(of_token_NR, dtype=torch.bool)
        is_new_NR[:, 1:] = of_token_NR[:, 1:] != of_token_NR[:, :-1]
        self.tokens_LE[layer] += of_token_NR[is_new_NR].bincount(minlength=experts).cpu()
        self.distinct_LR[layer] += is_new_NR.sum(1).bincount(minlength=self.distinct_LR.shape[1]).cpu()
        first_NH = expert_NHK[:, :, 0]
        self.agreement_LHH[layer] += (first_NH[:, :, None] == first_NH[:, None, :]).sum(0).cpu()
        self.first_weight_L[layer] += gate_NHK[:, :, 0].sum(dtype=torch.float64).cpu()

    def plain(self) -> RoutingCounts:
        return RoutingCounts(
            tokens=self.tokens,
            counts=self.counts_LE.tolist(),
            tokens_of=self.tokens_LE.tolist(),
            distinct=self.distinct_LR.tolist(),
            agreement=self.agreement_LHH.tolist(),
            first_weight=self.first_weight_L.tolist(),
        )
