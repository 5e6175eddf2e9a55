"""The trunk of a model: a stack of transformer blocks, and the code that all models share for such stacks."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from mhmoe_kernels import allow_compilation
from mhmoe_ray.model.moe import MoELayer, dispatch_locally
from mhmoe_ray.model.noise import Noise
from mhmoe_ray.model.recompute import recompute_in_backward
from mhmoe_ray.model.router import Routing
from mhmoe_ray.planner.parts import BLOCKS
from mhmoe_ray.spec import ModelSpec
from mhmoe_ray.spec.train import Recompute


class TrunkBlock(nn.Module):
    """Transformer block, the base class of all models' blocks."""

    moe: MoELayer | None

    @property
    def has_distributed_experts(self) -> bool:
        """True if the block's experts are distributed over ranks."""
        return self.moe is not None and self.moe.dispatch is not dispatch_locally


class RecomputedParts(NamedTuple):
    """Parts of a block that the backward recomputes, to save memory."""

    block: bool
    attention: bool  # only the attention part, not the feed-forward layer or experts


class Trunk(nn.Module, ABC):
    """Stack of transformer blocks; the base class of all models."""

    blocks: nn.ModuleList
    on_part: Callable[[str], None] = staticmethod(lambda _: None)
    """Callback with each part of a step that begins (`observed_parts` in parts.py)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.recompute: Recompute = "none"
        """What to recompute of each block (`TrainSpec.recompute`), apart from `MoESpec.recompute`."""
        self.residual_dtype: torch.dtype | None = None  # None keeps the dtype of embeddings, float32 or wider
        self.is_compiled = False
        self.is_random = spec.is_random  # whether training draws random numbers

    @abstractmethod
    def final_norms(self) -> list[nn.Module]:
        """Return the norms between the last block and the output layers."""

    def recomputed_parts(self, block: TrunkBlock) -> RecomputedParts:
        """Return what the backward recomputes of a block; nothing without gradients."""
        recompute = self.recompute if torch.is_grad_enabled() else "none"
        # Recomputing a whole block with distributed experts would exchange their rows between ranks a second time.
        is_whole = recompute == "block" or (recompute == "exchange" and not block.has_distributed_experts)
        return RecomputedParts(is_whole, recompute == "exchange" and not is_whole)

    def run_blocks(self, *inputs: Tensor, noise: Noise | None, **arguments: Any) -> tuple[list[Tensor], list[Routing]]:
        """Return the last block's residual streams for the inputs of the first, and the routing of each
        mixture-of-experts layer, from the first to the last. Every block gets the `arguments`."""
        self.on_part(BLOCKS)
        device = inputs[0].device
        hidden = [x if self.residual_dtype is None else x.to(self.residual_dtype) for x in inputs]
        routings = []
        for i, block in enumerate(self.blocks):
            recompute_block, recompute_attention = self.recomputed_parts(cast("TrunkBlock", block))
            create_generator = partial(noise.generator, i, device) if noise else lambda: None
            run_block: Callable[..., Any] = partial(
                block, create_generator=create_generator, recompute=recompute_attention, **arguments
            )
            *hidden, routing = recompute_in_backward(run_block, *hidden) if recompute_block else run_block(*hidden)
            if routing is not None:
                routings.append(routing)
        return hidden, routings

    def compile_blocks(self, **options: Any) -> None:
        """Set up torch.compile for each block, in place, for its first call. The exchange of rows between ranks is not
        compiled and divides a block. The model must not draw random numbers, as dropout does."""
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
        """Return a checkpoint's `weights`, detached: parameters and selection biases."""
        training_buffers = self.training_buffers()
        tensors = (*self.named_parameters(), *self.named_buffers())
        return {name: t.detach() for name, t in tensors if name not in training_buffers}

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that training updates: those of an adapter, or all."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def tensors_by_layer(self) -> list[dict[str, Tensor]]:
        """Return the `named_tensors` in groups: those outside the blocks, then those of each block."""
        groups: list[dict[str, Tensor]] = [{} for _ in range(1 + self.spec.layers)]
        for name, tensor in self.named_tensors().items():
            _, block, suffix = name.partition("blocks.")
            groups[1 + int(suffix.split(".")[0]) if block else 0][name] = tensor
        return groups

    def training_buffers(self) -> dict[str, Tensor]:
        """Return the buffers that only training needs: experts' shares of the last step's choices."""
        return {name: t for name, t in self.named_buffers() if name.endswith(".share_E")}


def add_residual(x_BTM: Tensor, y_BTM: Tensor) -> Tensor:
    """Add a layer's output y to the residual stream x, in the dtype of x."""
    return (x_BTM + y_BTM).to(x_BTM.dtype)


def routing_loss(spec: ModelSpec, routing: list[Routing]) -> Tensor:
    """Return the weighted load balancing loss and router z-loss of a micro-batch, summed over layers."""
    assert spec.moe is not None
    layers = [spec.moe.balance_weight * r.balance_loss + spec.moe.z_weight * r.z_loss for r in routing]
    return torch.stack(layers).sum()
