"""The decoder: pre-norm blocks of attention, and of feed-forward or mixture-of-experts layers."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mhmoe_kernels import wide
from mhmoe_ray.model.architectures import modules_of
from mhmoe_ray.model.attention import Attend, Attention, Rotary, document_mask, rotary
from mhmoe_ray.model.feedforward import FeedForward
from mhmoe_ray.model.moe import MultiHeadMoE, dispatch_locally
from mhmoe_ray.model.noise import EMBEDDING, Noise, dropout
from mhmoe_ray.model.router import Routing
from mhmoe_ray.spec import ModelSpec

R = TypeVar("R")


class Past(Protocol):
    """KV cache of the tokens before the newest ones, in generation."""

    position_T: Tensor
    """Positions of the newest tokens, int64; each of the B rows may hold the tokens of several sequences, one after
    another."""

    def attend(self, layer: int, q_BHTC: Tensor, k_BHTC: Tensor, v_BHTC: Tensor) -> Tensor:
        """Return the attention output of the newest tokens in a layer, and store their keys and values."""
        ...

    def wanted(self, x_BTM: Tensor) -> Tensor:
        """Return the rows of those tokens whose logits are requested."""
        ...


class Block(nn.Module):
    """Decoder block: x + attention(norm(x)), then x + feed-forward(norm(x)); the feed-forward part is dense or a
    mixture of experts."""

    def __init__(self, spec: ModelSpec, layer: int, held: range | None) -> None:
        super().__init__()
        self.dropout = spec.dropout
        self.attention_norm = modules_of(spec).norm(spec)
        self.attention = Attention(spec)
        self.ffn_norm = modules_of(spec).norm(spec)
        self.moe = MultiHeadMoE(spec, held) if spec.is_moe_layer(layer) else None
        self.ffn: FeedForward | None = None
        if self.moe is None:
            assert spec.d_ff is not None
            self.ffn = FeedForward(spec, spec.d_ff)

    @property
    def is_spread(self) -> bool:
        """Whether the block's experts are spread over ranks."""
        return self.moe is not None and self.moe.dispatch is not dispatch_locally

    def forward(
        self,
        x_BTM: Tensor,
        at: Rotary,
        past: Attend | None,
        draw: Callable[[], torch.Generator | None],
        mask_B1TT: Tensor | None,
        recompute: bool,
    ) -> tuple[Tensor, Routing | None]:
        """Run the block; return its output, and its routing if it has experts.

        Args:
            x_BTM: the tokens.
            at: rotary tables of their positions.
            past: attention over a KV cache, for generation after earlier tokens.
            draw: function that creates the block's random generator, with the same draws each time; it may return None.
            mask_B1TT: attention mask.
            recompute: whether the backward recomputes the part before the feed-forward layer.
        """
        made: list[torch.Generator | None] = []

        def attend(x_BTM: Tensor) -> Tensor:
            made.append(draw())
            y_BTM = self.attention(self.attention_norm(x_BTM), at, past, made[-1], mask_B1TT)
            return x_BTM + dropout(y_BTM, self.dropout, made[-1])

        x_BTM = _recomputed(attend, x_BTM) if recompute else attend(x_BTM)
        generator = made[0]  # where attention has left it
        y_BTM = self.ffn_norm(x_BTM)
        if self.moe is not None:
            y_BTM, routing = self.moe(y_BTM, generator)  # dropout is inside, on each expert's output
            return x_BTM + y_BTM, routing
        assert self.ffn is not None
        return x_BTM + dropout(self.ffn(y_BTM), self.dropout, generator), None


class Output(NamedTuple):
    """Output of the decoder for a batch of tokens."""

    logits_BTV: Tensor
    routing: list[Routing]
    """Routing of each mixture-of-experts layer, from the bottom."""


class Decoder(nn.Module):
    """Decoder from tokens to next-token logits: an embedding, blocks, and an output layer."""

    def __init__(self, spec: ModelSpec, held: range | None = None) -> None:
        """Create the decoder with uninitialized weights: call `model.init.init_weights`, or load a checkpoint.

        Args:
            spec: the model's sizes and options.
            held: global ids of the experts that this process holds in every layer; by default all.
        """
        super().__init__()
        self.spec = spec
        self.recompute = False
        """Whether training keeps only the input of each block and recomputes the rest in the backward (activation
        recomputation). For a block whose experts are spread over ranks, the forward also keeps the experts' inputs and
        outputs, so that they need not be exchanged again."""
        self.embedding = nn.Embedding(spec.vocab_size, spec.d_model)
        self.blocks = nn.ModuleList(Block(spec, i, held) for i in range(spec.layers))
        self.norm = modules_of(spec).norm(spec)
        self.output = None if spec.tied_embeddings else nn.Linear(spec.d_model, spec.vocab_size, bias=False)

    def forward(
        self,
        token_BT: Tensor,
        past: Past | None = None,
        noise: Noise | None = None,
        document_BT: Tensor | None = None,
    ) -> Output:
        """Return next-token logits, and the routing of each mixture-of-experts layer.

        Args:
            token_BT: token ids, int64.
            past: KV cache of the earlier tokens; the call adds the new ones to it.
            noise: randomness of a training step; used only if the spec has any.
            document_BT: index of each token's document, int, if the spec has `document_masks`. Not together with
                `past`: a prompt is one document.
        """
        assert (document_BT is not None) == (self.spec.document_masks and past is None)
        at = rotary(self.spec, past.position_T if past else torch.arange(token_BT.shape[1], device=token_BT.device))
        x_BTM = wide(self.embedding(token_BT))  # a server may hold weights in bfloat16
        if (scale := modules_of(self.spec).embedding_scale(self.spec)) != 1:
            x_BTM = x_BTM * scale
        mask_B1TT = None if document_BT is None else document_mask(document_BT, _compute_dtype(x_BTM))
        routings = []
        draws = noise if self.spec.is_random else None
        if draws:
            x_BTM = dropout(x_BTM, self.spec.dropout, draws.generator(EMBEDDING, token_BT.device))

        recompute = self.recompute and torch.is_grad_enabled()
        for i, block in enumerate(cast("list[Block]", self.blocks)):
            whole = recompute and not block.is_spread

            def through(x_BTM: Tensor, i: int = i, block: Block = block, whole: bool = whole) -> Any:
                draw = partial(draws.generator, i, x_BTM.device) if draws else lambda: None
                attend = partial(past.attend, i) if past else None
                return block(x_BTM, at, attend, draw, mask_B1TT, recompute and not whole)

            x_BTM, routing = _recomputed(through, x_BTM) if whole else through(x_BTM)
            if routing is not None:
                routings.append(routing)
        if past:
            x_BTM = past.wanted(x_BTM)
        x_BTM = self.norm(x_BTM)
        logits = F.linear(x_BTM, self.embedding.weight) if self.output is None else self.output(x_BTM)
        return Output(logits, routings)

    def compile_dense(self) -> None:
        """Compile attention and dense feed-forward layers with torch.compile, at their first use."""
        for module in self.modules():
            if isinstance(module, Attention | FeedForward):
                module.compile()

    def moe_layers(self) -> list[MultiHeadMoE]:
        return [m for m in self.modules() if isinstance(m, MultiHeadMoE)]

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors of a checkpoint's `weights` by name, detached: parameters and the routers' selection
        biases."""
        return {name: t.detach() for name, t in (*self.named_parameters(), *self.named_buffers())}


def _recomputed(function: Callable[[Tensor], R], x_BTM: Tensor) -> R:
    """Return `function(x_BTM)`; only its input is kept, and the backward computes it again."""
    # Draws come from generators of their own; the default one's state need not be kept.
    result: R = checkpoint(function, x_BTM, use_reentrant=False, preserve_rng_state=False)
    return result


def _compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of matrix products with x: autocast's where it is on, else that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def token_losses(logits_BTV: Tensor, target_BT: Tensor) -> Tensor:
    """Return the cross-entropy of each token in nats, float32, shape BT."""
    loss = F.cross_entropy(logits_BTV.float().flatten(0, 1), target_BT.flatten(), reduction="none")
    return loss.view(target_BT.shape)


def routing_loss(spec: ModelSpec, routing: list[Routing]) -> Tensor:
    """Return the load-balancing loss and router z-loss of a micro-batch, weighted by the spec and summed over
    layers."""
    assert spec.moe is not None
    layers = [spec.moe.balance_weight * r.balance_loss + spec.moe.z_weight * r.z_loss for r in routing]
    return torch.stack(layers).sum()
