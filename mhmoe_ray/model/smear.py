"""SMEAR, soft merging of experts with adaptive routing (arXiv 2306.03745): an average of all experts for each sample.

    positions of a sample (U, M) -> mean without padding -> norm -> logits -> softmax -> probabilities (E)
    weights of experts (E, F, M) -> average by probabilities (F, M) -> merged expert, which computes all U positions

Without a discrete choice, the router learns by gradients alone: it needs no expert capacity and no balancing loss. It
averages over whole samples, so the layer is for encoders only.

The router is that of the authors' code (github.com/r-three/smear, class Router of adapter_utils.py) with the settings
of their runs: the mean passes a layer norm, and so does each expert's row of the router's weights, with a gain that
starts at 0.01. There is no bias. The bias vector of their norm of rows is left out, because it cannot change a softmax:
it adds the same number to all logits.

Probabilities are computed in float32 or wider. Weights are merged in the precision of matrix products. Additional shape
suffixes: S samples of a micro-batch, U positions of a sample.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhmoe_kernels import widen
from mhmoe_ray.model.feedforward import Experts, FeedForward, SharedExpert
from mhmoe_ray.model.moe import MoELayer, dispatch_locally
from mhmoe_ray.model.noise import dropout
from mhmoe_ray.model.recompute import recompute_in_backward
from mhmoe_ray.model.router import NO_CONTEXT, BaseRouter, LinearScores, Routing, RoutingContext, route_counts
from mhmoe_ray.model.router.base import routing_without_losses
from mhmoe_ray.spec import ModelSpec, MoESpec


class SmearScores(LinearScores):
    """Module of the logits of router `smear`: the normalized mean of a sample times normalized weights."""

    def __init__(self, width: int, moe: MoESpec, eps: float) -> None:
        super().__init__(width, moe)
        self.eps = eps
        self.norm_weight_D, self.norm_bias_D = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))
        self.row_gain_D = nn.Parameter(torch.empty(width))

    def forward(self, x_ND: Tensor) -> Tensor:
        normed_ND = F.layer_norm(x_ND, x_ND.shape[1:], widen(self.norm_weight_D), widen(self.norm_bias_D), self.eps)
        row_ED = F.layer_norm(widen(self.weight_ED), x_ND.shape[1:], widen(self.row_gain_D), None, self.eps)
        return normed_ND @ row_ED.T


class SmearRouter(BaseRouter):
    """Router that gives each sample a probability for every expert."""

    def __init__(self, width: int, moe: MoESpec, eps: float) -> None:
        super().__init__(moe)
        self.scores = SmearScores(width, moe, eps)

    def forward(
        self, x_ND: Tensor, generator: torch.Generator | None = None, context: RoutingContext = NO_CONTEXT
    ) -> Routing:
        """Return a routing of each sample's mean to all experts, with probabilities as gates."""
        # Autocast would compute logits in bfloat16, in which many different logits become equal.
        with torch.autocast(x_ND.device.type, enabled=False):
            probability_NE = self.scores(widen(x_ND)).softmax(-1)
        probability_NE = self._drop_experts(probability_NE, generator)
        expert_NK = torch.arange(self.moe.experts, device=x_ND.device).expand_as(probability_NE)
        count_E = route_counts(probability_NE.argmax(-1, keepdim=True), self.moe.experts)
        return routing_without_losses(expert_NK, probability_NE, count_E)

    def _drop_experts(self, probability_NE: Tensor, generator: torch.Generator | None) -> Tensor:
        """Drop experts at random, and rescale the other probabilities to a sum of 1."""
        rate = self.moe.expert_dropout
        if not rate or generator is None:
            return probability_NE
        keep_mask = torch.rand(probability_NE.shape, device=probability_NE.device, generator=generator) >= rate
        # With this constant of SMEAR's authors (1e-10), a sample whose experts were all dropped gets the plain average
        # of all experts.
        kept_NE = probability_NE * keep_mask + 1e-10
        return kept_NE / kept_NE.sum(-1, keepdim=True)


class MergedExperts(MoELayer):
    """Mixture-of-experts layer that merges all experts into one for each sample. Its parameters have the names of those
    of a `MultiHeadMoE` with one head."""

    def __init__(self, spec: ModelSpec, expert_ids: range | None = None) -> None:
        super().__init__()
        moe = spec.moe
        assert moe is not None
        assert expert_ids is None or len(expert_ids) == moe.experts
        self.dropout = spec.dropout
        self.router = SmearRouter(spec.row_width, moe, spec.norm_eps)
        self.experts = Experts(spec, range(moe.experts))
        self.shared = FeedForward(spec, moe.d_shared) if moe.d_shared else None
        self.dispatch = dispatch_locally

    def forward(
        self, samples: Sequence[Tensor], masks: Sequence[Tensor | None], generator: torch.Generator | None = None
    ) -> tuple[list[Tensor], Routing]:
        """Return the outputs of all positions in sets of samples (B, U, M), and the routing, a row for each sample.

        A mask, (B, 1, 1, U), is added to attention scores; None means no padding. `count_E` counts all positions,
        padding included, for their sample's most probable expert, to show which experts the router prefers.
        """
        lengths = [x_BUM.shape[:2] for x_BUM in samples]
        x_NM = torch.cat([x_BUM.flatten(0, 1) for x_BUM in samples])
        x_parts = _split_rows(x_NM, lengths)
        means = [_mean_of_positions(x_BUM, mask) for x_BUM, mask in zip(x_parts, masks, strict=True)]
        routing: Routing = self.router(torch.cat(means), generator)
        routing = routing._replace(count_E=self._count_positions(routing.gate_NK, lengths))
        # FSDP gathers the experts' weights only during their forward. They are merged inside it, because the forward
        # calls the function that it gets as its dispatch.
        y_NM, _ = self.experts(x_NM, routing, partial(run_merged, lengths=lengths))
        y_NM = dropout(y_NM, self.dropout, generator)
        if self.shared is not None:
            y_NM = y_NM + dropout(self.shared(x_NM), self.dropout, generator)
        return _split_rows(y_NM, lengths), routing

    def _count_positions(self, probability_SE: Tensor, lengths: Sequence[torch.Size]) -> Tensor:
        """Return for each expert the positions of samples that prefer it."""
        best_parts = torch.split(probability_SE.argmax(-1, keepdim=True), [samples for samples, _ in lengths])
        counts = [
            positions * route_counts(best_B1, probability_SE.shape[1])
            for best_B1, (_, positions) in zip(best_parts, lengths, strict=True)
        ]
        return torch.stack(counts).sum(0)


def run_merged(
    x_NM: Tensor,
    routing: Routing,
    experts: Experts,
    shared: SharedExpert | None = None,
    *,
    lengths: Sequence[torch.Size],
) -> tuple[Tensor, None]:
    """Run positions through their sample's merged expert, as a dispatch."""

    def run(x_NM: Tensor, probability_SE: Tensor) -> Tensor:
        x_NM, weights = experts.cast_rows(x_NM)
        probability_SE = probability_SE.to(weights.stacked[0].dtype)
        merged = [
            (probability_SE @ stack.flatten(1)).view(len(probability_SE), *stack.shape[1:]) for stack in weights.stacked
        ]
        sample_counts = [samples for samples, _ in lengths]
        merged_parts = zip(*(torch.split(weight, sample_counts) for weight in merged), strict=True)
        # vmap reads the name of the function that it gets. torch.compile finds that name for a method, but not for an
        # instance of a data class.
        run_samples = torch.vmap(weights.function.__call__)
        outputs = [run_samples(x, *part) for x, part in zip(_split_rows(x_NM, lengths), merged_parts, strict=True)]
        return torch.cat([y.flatten(0, 1) for y in outputs])

    # The backward of the hidden rows needs the merged weights, so both are recomputed together.
    if experts.recompute and torch.is_grad_enabled():
        return recompute_in_backward(run, x_NM, routing.gate_NK), None
    return run(x_NM, routing.gate_NK), None


def _split_rows(x_NM: Tensor, lengths: Sequence[torch.Size]) -> list[Tensor]:
    """Return sets of samples as views (B, U, M)."""
    parts = torch.split(x_NM, [length.numel() for length in lengths])
    return [part.view(*length, x_NM.shape[1]) for part, length in zip(parts, lengths, strict=True)]


def _mean_of_positions(x_BUM: Tensor, mask: Tensor | None) -> Tensor:
    """Return each sample's mean without padding, in float32 or wider."""
    x_BUM = widen(x_BUM)
    if mask is None:
        return x_BUM.mean(1)
    is_real_BU = (mask[:, 0, 0] == 0).to(x_BUM.dtype)
    share_BU = is_real_BU / is_real_BU.sum(1, keepdim=True)
    # Autocast would compute this mean in bfloat16, which is too coarse for the router.
    with torch.autocast(x_BUM.device.type, enabled=False):
        return (share_BU[:, None] @ x_BUM)[:, 0]
