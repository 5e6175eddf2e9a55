"""The interface of the sizes of a family of models: parts around the blocks, and memory of outputs and losses."""

from abc import ABC, abstractmethod
from typing import NamedTuple

from mhmoe_ray.architectures import FLOAT32
from mhmoe_ray.spec import ModelSpec, RunSpec
from mhmoe_ray.spec.base import Precision

# Bytes per value of the integer types.
INT32 = 4
INT64 = 8
EMBEDDING, PATCHES, NORMS, OUTPUT = "embedding", "patches", "norms", "output"
PROJECTIONS, ROUTER, EXPERTS, SHARED = "projections", "router", "experts", "shared expert"
MATCH, HEADS = "match", "heads"
"""Names of the parts of a model (`Part.name`) that other modules look up."""


class Part(NamedTuple):
    """Part of a model: one kind of layer, with the counts of a single layer of this kind."""

    name: str
    layers: int
    parameters: int
    active: int
    """Number of parameters that one token's forward pass uses."""
    macs: int
    """Multiply-adds of matrix products for one token."""


class FamilySizes(ABC):
    """Sizes of a family's models, computed from the spec without building them."""

    branches = 1
    """Number of copies of attention, norms and feed-forward layers in a block."""
    is_causal = True
    """Whether a token attends only to the tokens before it."""
    gathers_outside_in_float32 = False
    """Whether fsdp gathers all parameters outside blocks in float32."""

    @abstractmethod
    def embedding_rows(self, model: ModelSpec) -> int:
        """Return the number of vectors of all embeddings."""

    def input_parts(self, model: ModelSpec) -> list[Part]:
        """Return the parts between the embedding and the first block."""
        return []

    @abstractmethod
    def output_parts(self, model: ModelSpec) -> list[Part]:
        """Return the parts after the last block."""

    def routers(self, model: ModelSpec) -> int:
        """Return the number of routers of an expert layer; a token uses one of them."""
        return 1

    @abstractmethod
    def output_bytes(self, spec: RunSpec, size: int) -> int:
        """Return the bytes that inputs, outputs and losses of a micro-batch keep for the backward.

        Args:
            spec: spec of the run.
            size: bytes per value in matrix products.
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


def sizes_of(model: ModelSpec) -> FamilySizes:
    """Return the sizes of a model's family."""
    sizes: type[FamilySizes] = model.family.part("sizes")
    return sizes()


def bytes_of(precision: Precision) -> int:
    """Return the bytes per value of a precision."""
    return 2 if precision == "bfloat16" else FLOAT32


def all_active(parameters: int) -> tuple[int, int]:
    """Return `parameters` and `active` of a part whose parameters are all used for every token."""
    return parameters, parameters
