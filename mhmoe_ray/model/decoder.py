"""The decoder: pre-norm blocks of attention, and of feed-forward or mixture-of-experts layers."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhmoe_kernels import widen
from mhmoe_ray.model.architectures import modules_of
from mhmoe_ray.model.attention import (
    Documents,
    document_mask,
    has_variable_length_kernel,
)
from mhmoe_ray.model.autocast import matmul_dtype
from mhmoe_ray.model.branch import Branch
from mhmoe_ray.model.loss import Loss, Targets, chunked_loss, full_loss
from mhmoe_ray.model.moe import MultiHeadMoE
from mhmoe_ray.model.noise import EMBEDDING, Noise, dropout
from mhmoe_ray.model.recompute import recompute_in_backward
from mhmoe_ray.model.rotary import RotaryTables, rotary_tables
from mhmoe_ray.model.router import Routing
from mhmoe_ray.model.trunk import Trunk, TrunkBlock, add_residual
from mhmoe_ray.spec import ModelSpec


class KeyValueCache(Protocol):
    """KV cache for generation, with the keys and values of all earlier tokens."""

    position_T: Tensor  # of the newest tokens, int64; a batch may have several sequences, one after another

    def attend(self, layer: int, q_BHTC: Tensor, k_BHTC: Tensor, v_BHTC: Tensor) -> Tensor:
        """Store the newest tokens' keys and values in layer `layer`, and return their attention over all tokens."""
        ...

    def requested_rows(self, x_BTM: Tensor) -> Tensor:
        """Return the hidden states of the tokens that get logits."""
        ...


class Block(Branch, TrunkBlock):
    """Decoder block: x + attention(norm(x)), then x + feed-forward(norm(x)), which is dense or a mixture of experts."""

    moe: MultiHeadMoE | None

    def __init__(self, spec: ModelSpec, layer: int, expert_ids: range | None) -> None:
        super().__init__(spec, layer)
        self.layer, self.dropout = layer, spec.dropout
        self.moe = MultiHeadMoE(spec, expert_ids) if spec.is_moe_layer(layer) else None

    def forward(
        self,
        x_BTM: Tensor,
        tables: RotaryTables,
        cache: KeyValueCache | None,
        create_generator: Callable[[], torch.Generator | None],
        documents: Documents | None,
        recompute: bool,
        domain_B: Tensor | None,
    ) -> tuple[Tensor, Routing | None]:
        """Return the output and, with experts, the routing. `create_generator` returns a generator in the same state at
        each call, or None in evaluation. `recompute` is about attention. Only router `domain` uses `domain_B`."""
        cached_attention = partial(cache.attend, self.layer) if cache else None

        def run_attention(x_BTM: Tensor) -> tuple[Tensor, torch.Generator | None]:
            # The backward may run this again and must then draw the same numbers, so each run creates a new generator.
            generator = create_generator()
            y_BTM = self.attention(self.attention_norm(widen(x_BTM)), tables, cached_attention, generator, documents)
            return add_residual(x_BTM, dropout(y_BTM, self.dropout, generator)), generator

        # The rest of the block draws from `generator`, which continues after the random numbers that attention has
        # drawn.
        x_BTM, generator = recompute_in_backward(run_attention, x_BTM) if recompute else run_attention(x_BTM)
        y_BTM = self.ffn_norm(widen(x_BTM))
        if self.moe is not None:
            # The layer itself applies dropout, on each expert's output.
            y_BTM, routing = self.moe(y_BTM, generator, domain_B)
            return add_residual(x_BTM, y_BTM), routing
        assert self.ffn is not None
        return add_residual(x_BTM, dropout(self.ffn(y_BTM), self.dropout, generator)), None


class DecoderOutput(NamedTuple):
    """Output of the decoder without targets."""

    logits_BTV: Tensor
    routing: list[Routing]  # of each mixture-of-experts layer, from the first layer to the last


class DecoderLoss(NamedTuple):
    """Output of the decoder with targets."""

    loss: Loss
    routing: list[Routing]  # of each mixture-of-experts layer, from the first layer to the last


class Decoder(Trunk):
    """Decoder from tokens to next-token logits. Its weights are uninitialized until `init_weights` or a checkpoint."""

    def __init__(self, spec: ModelSpec, expert_ids: range | None = None) -> None:
        super().__init__(spec)
        self.loss_chunk_rows: int | None = None  # tokens whose logits exist at a time in the loss; None for all
        self.embedding = nn.Embedding(spec.vocab_size, spec.d_model)
        self.blocks = nn.ModuleList(Block(spec, i, expert_ids) for i in range(spec.layers))
        self.norm = modules_of(spec).norm(spec)
        self.output = None if spec.tied_embeddings else nn.Linear(spec.d_model, spec.vocab_size, bias=False)

    def final_norms(self) -> list[nn.Module]:
        return [self.norm]

    def forward(
        self,
        token_BT: Tensor,
        cache: KeyValueCache | None = None,
        noise: Noise | None = None,
        document_BT: Tensor | None = None,
        domain_B: Tensor | None = None,
        targets: Targets | None = None,
        document_offset_N1: Tensor | None = None,
    ) -> DecoderOutput | DecoderLoss:
        """Return next-token logits or, with targets, the loss; and the routing of each mixture-of-experts layer.

        The call adds the new tokens to the cache, which selects those that get logits. `noise` is None in evaluation.
        `document_BT` is required with `document_masks` and no cache; with `document_offsets`, attention on a GPU needs
        no mask. Router `domain` requires `domain_B`, each sequence's expert. `token_BT` and `domain_B` are int64. The
        loss is computed here, because FSDP and ZeRO gather the output layer's weights only during the call.
        """
        # A prompt is one document, so generation with a cache needs no mask.
        assert (document_BT is not None) == (self.spec.document_masks and cache is None)
        tables = rotary_tables(
            self.spec, cache.position_T if cache else torch.arange(token_BT.shape[1], device=token_BT.device)
        )
        # A server may hold weights in bfloat16, but the residual stream is float32 unless the run's spec sets bfloat16.
        x_BTM = widen(self.embedding(token_BT))
        if (scale := modules_of(self.spec).embedding_scale(self.spec)) != 1:
            x_BTM = x_BTM * scale
        documents = None
        if document_BT is not None:
            needs_mask = document_offset_N1 is None or not has_variable_length_kernel(self.spec, x_BTM)
            mask_B1TT = document_mask(document_BT, matmul_dtype(x_BTM)) if needs_mask else None
            documents = Documents(mask_B1TT, None if needs_mask else document_offset_N1)
            if self.is_compiled and documents.offset_N1 is not None:
                # The number of documents changes with every micro-batch, so compiled code must accept any number.
                torch._dynamo.maybe_mark_dynamic(documents.offset_N1, 0)
        active_noise = noise if self.is_random else None
        if active_noise:
            x_BTM = dropout(x_BTM, self.spec.dropout, active_noise.generator(EMBEDDING, token_BT.device))
        [x_BTM], routings = self.run_blocks(
            x_BTM, noise=active_noise, tables=tables, cache=cache, documents=documents, domain_B=domain_B
        )
        if cache:
            x_BTM = cache.requested_rows(x_BTM)
        x_BTM = self.norm(widen(x_BTM))
        if targets is not None and self.loss_chunk_rows is not None:
            weight_VM = self.embedding.weight if self.output is None else self.output.weight
            return DecoderLoss(chunked_loss(x_BTM, weight_VM, targets, self.loss_chunk_rows), routings)
        logits = F.linear(x_BTM, self.embedding.weight) if self.output is None else self.output(x_BTM)
        return DecoderOutput(logits, routings) if targets is None else DecoderLoss(full_loss(logits, targets), routings)
