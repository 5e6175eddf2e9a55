"""The trunk of a model: a stack of transformer blocks, and the code that all models share for such stacks."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mhmoe_kernels import allow_compilation
from mhmoe_ray.model.moe import MoELayer, dispatch_locally
from mhmoe_ray.model.router import Routing
from mhmoe_ray.spec import ModelSpec
from mhmoe_ray.spec.train import Recompute

R = TypeVar("R")


class TrunkBlock(nn.Module):
    """Transformer block that may have a mixture-of-experts layer; the base class of the blocks of all models."""

    moe: MoELayer | None

    @property
    def has_distributed_experts(self) -> bool:
        """True if the block has experts that are distributed over ranks (expert parallelism)."""
        return self.moe is not None and self.moe.dispatch is not dispatch_locally


class RecomputedParts(NamedTuple):
    """Choice of what the backward pass recomputes of one transformer block, to save memory."""

    block: bool
    attention: bool  # only the attention part, not the feed-forward layer or experts


class Trunk(nn.Module, ABC):
    """Stack of transformer blocks; the base class of all models."""

    blocks: nn.ModuleList

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.recompute: Recompute = "none"
        """Part of each block to recompute (`TrainSpec.recompute`); `MoESpec.recompute` is about experts' hidden
        activations."""
        self.residual_dtype: torch.dtype | None = None  # None keeps the dtype of embeddings, float32 or wider
        self.is_compiled = False

    @abstractmethod
    def final_norms(self) -> list[nn.Module]:
        """Return the norms between the last block and the output layers."""

    def recomputed_parts(self, block: TrunkBlock) -> RecomputedParts:
        """Return which parts of a block the backward must recompute; none if gradients are disabled."""
        recompute = self.recompute if torch.is_grad_enabled() else "none"
        # Recomputing a whole block with distributed experts would exchange their rows between ranks a second time.
        is_whole = recompute == "block" or (recompute == "exchange" and not block.has_distributed_experts)
        return RecomputedParts(is_whole, recompute == "exchange" and not is_whole)

    def compile_blocks(self, **options: Any) -> None:
        """Set up torch.compile for each block, in place; a block is compiled at its first call. The exchange of rows
        between ranks divides a block into parts and is not compiled. The model must not draw random numbers, as dropout
        does."""
        allow_compilation()
        for layer in self.moe_layers():
            if layer.dispatch is not dispatch_locally:
                layer.dispatch = torch.compiler.disable(layer.dispatch)  # type: ignore[no-untyped-call]
        self.is_compiled = True
        for block in self.blocks:
            # All sizes but the number of documents stay the same. By default, torch compiles code for any size as soon
            # as another model in this process has other sizes. Such code cannot choose a kernel by its sizes.
            block.compile(dynamic=False, **options)

    def moe_layers(self) -> list[MoELayer]:
        return [m for m in self.modules() if isinstance(m, MoELayer)]

    def named_tensors(self) -> dict[str, Tensor]:
        """Return all tensors that a checkpoint stores as `weights`, by name and detached: parameters and selection
        biases."""
        training_buffers = self.training_buffers()
        tensors = (*self.named_parameters(), *self.named_buffers())
        return {name: t.detach() for name, t in tensors if name not in training_buffers}

    def training_buffers(self) -> dict[str, Tensor]:
        """Return the buffers that only training needs, by name: each expert's share of the choices of the last step."""
        return {name: t for name, t in self.named_buffers() if name.endswith(".share_E")}


def add_residual(x_BTM: Tensor, y_BTM: Tensor) -> Tensor:
    """Add the output y of a layer to the residual stream x, and return the sum in the dtype of x."""
    return (x_BTM + y_BTM).to(x_BTM.dtype)


def recompute_in_backward(function: Callable[..., R], *inputs: Tensor) -> R:
    """Return `function(*inputs)`. Only its inputs are kept for the backward, which calls the function again."""
    # The state of torch's default generator need not be kept, because all random numbers are drawn from other
    # generators.
    result: R = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return result


def routing_loss(spec: ModelSpec, routing: list[Routing]) -> Tensor:
    """Return the load balancing loss and the router z-loss of a micro-batch, weighted and summed over layers."""
    assert spec.moe is not None
    layers = [spec.moe.balance_weight * r.balance_loss + spec.moe.z_weight * r.z_loss for r in routing]
    return torch.stack(layers).sum()
