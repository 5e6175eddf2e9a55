"""The part of a plan that differs between families of models, and this part for decoders.

It has the parts around the blocks, the memory of outputs and losses, and lines of the summary.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

from mhmoe_ray.architectures import FLOAT32
from mhmoe_ray.planner.kernels import launches_per_micro_batch
from mhmoe_ray.spec import ModelSpec, RunSpec
from mhmoe_ray.spec.base import Precision
from mhmoe_ray.spec.train import LOSS_CHUNKS_PER_PRODUCT

# Bytes per value of the integer types.
INT32 = 4
INT64 = 8
EMBEDDING, PATCHES, ATTENTION, NORMS, OUTPUT = "embedding", "patches", "attention", "norms", "output"
PROJECTIONS, ROUTER, EXPERTS, SHARED = "projections", "router", "experts", "shared expert"
FEED_FORWARD = "feed-forward"
MATCH, HEADS = "match", "heads"
"""Names of the parts of a model (`ModelPart.name`) that other modules look up."""


class ModelPart(NamedTuple):
    """Part of a model: one kind of layer, with the counts of a single layer of this kind."""

    name: str
    layers: int
    parameters: int
    active: int
    """Number of parameters that one token's forward pass uses."""
    macs: int
    """Multiply-adds of matrix products for one token."""


class FamilyPlan(ABC):
    """Plan of a family's models, computed from the spec without building them."""

    branches = 1
    """Number of copies of attention, norms and feed-forward layers in a block."""
    is_causal = True
    """Whether a token attends only to the tokens before it."""
    gathers_outside_in_float32 = False
    """Whether fsdp gathers all parameters outside blocks in float32."""

    @abstractmethod
    def embedding_rows(self, model: ModelSpec) -> int:
        """Return the number of vectors of all embeddings."""

    def input_parts(self, model: ModelSpec) -> list[ModelPart]:
        """Return the parts between the embedding and the first block."""
        return []

    @abstractmethod
    def output_parts(self, model: ModelSpec) -> list[ModelPart]:
        """Return the parts after the last block."""

    def routers(self, model: ModelSpec) -> int:
        """Return the number of routers of an expert layer; a token uses one of them."""
        return 1

    @abstractmethod
    def output_bytes(self, spec: RunSpec, size: int) -> int:
        """Return the bytes that inputs, outputs and losses of a micro-batch keep for the backward.

        `size` is the bytes per value in matrix products.
        """

    def shared_attention_bytes(self, spec: RunSpec, size: int) -> int:
        """Return the bytes of the tensors that all attention layers share, such as positions and masks."""
        return 0

    @abstractmethod
    def loss_bytes(self, spec: RunSpec) -> int:
        """Return the bytes that the loss needs temporarily."""

    def launches(self, spec: RunSpec) -> int:
        """Return the number of kernels that a micro-batch launches; 0 if they depend on its contents."""
        return 0

    def summary(self, spec: RunSpec) -> dict[str, str]:
        """Return the lines of a plan's summary that only this family has, by their titles."""
        return {}

    @abstractmethod
    def micro_batch(self, spec: RunSpec) -> str:
        """Return the size of a micro-batch as text."""


class DecoderPlan(FamilyPlan):
    """Plan of decoders: the output layer, the loss over all tokens, and the launches of kernels."""

    def embedding_rows(self, model: ModelSpec) -> int:
        return model.vocab_size

    def output_parts(self, model: ModelSpec) -> list[ModelPart]:
        # With tied embeddings the output has no parameters of its own, but its product still counts.
        macs = model.vocab_size * model.d_model
        parameters = 0 if model.tied_embeddings else macs
        return [ModelPart(OUTPUT, 1, parameters, parameters, macs)]

    def output_bytes(self, spec: RunSpec, size: int) -> int:
        # The terms are those of the loss, and of the token ids and targets. A chunked loss keeps the gradient of its
        # input instead of the input and the log-probabilities.
        model = spec.model
        loss = FLOAT32 * model.vocab_size
        if spec.train.loss_chunk_rows is not None:
            loss = (FLOAT32 - size) * model.d_model
        return spec.tokens_per_micro_batch * (loss + 2 * INT64)

    def shared_attention_bytes(self, spec: RunSpec, size: int) -> int:
        # The tensors are the cosines and sines of positions, for queries and for keys, and the document mask.
        T = spec.data.seq_len
        mask = size * spec.train.micro_batch_size * T**2 if spec.model.document_masks else 0
        return 4 * FLOAT32 * T * spec.model.head_width + mask

    def loss_bytes(self, spec: RunSpec) -> int:
        """Return the bytes that the loss needs temporarily.

        If all logits exist at once, these are the float32 gradients of log-probabilities and logits. A chunked loss
        holds, in float32, its input, the logits and log-probabilities of a chunk, the log-probabilities of the chunk
        before it, and the gradient of the output layer. In the precision of matrix products, it holds the gradients of
        the logits of one product, which covers several chunks in bfloat16. With products in bfloat16, it also holds a
        copy of the output layer in bfloat16, unless ranks gather it so.
        """
        tokens, vocab_size = spec.tokens_per_micro_batch, spec.model.vocab_size
        if spec.train.loss_chunk_rows is None:
            return tokens * vocab_size * 2 * FLOAT32
        rows, size = spec.train.loss_chunk_rows, bytes_of(spec.train.precision)
        product_rows = rows if size == FLOAT32 else LOSS_CHUNKS_PER_PRODUCT * rows
        copy_size = size if size < FLOAT32 and not spec.cluster.gathers_in_bfloat16 else 0
        first_rows, second_rows = min(rows, tokens), min(rows, max(0, tokens - rows))
        chunks = max(2 * first_rows, first_rows + 2 * second_rows) * FLOAT32 + min(product_rows, tokens) * size
        d_model = spec.model.d_model
        return tokens * d_model * FLOAT32 + vocab_size * (chunks + d_model * (FLOAT32 + copy_size))

    def launches(self, spec: RunSpec) -> int:
        return launches_per_micro_batch(spec)

    def micro_batch(self, spec: RunSpec) -> str:
        return f"{spec.train.micro_batch_size} x {spec.data.seq_len} tokens"


def plan_of(model: ModelSpec) -> FamilyPlan:
    """Return the plan of a model's family."""
    plan: type[FamilyPlan] = model.family.part("plan")
    return plan()


def bytes_of(precision: Precision) -> int:
    """Return the bytes per value of a precision."""
    return 2 if precision == "bfloat16" else FLOAT32


def all_active(parameters: int) -> tuple[int, int]:
    """Return `parameters` and `active` of a part whose parameters are all used for every token."""
    return parameters, parameters
