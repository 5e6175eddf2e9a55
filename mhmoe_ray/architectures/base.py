"""The interface of an architecture: what the spec allows, what the planner counts, what exported tensors are called.

Sizes are plain numbers, so that the spec can use an architecture: d is the width of the model, D the width of a row of
experts (d, or d/h), F the hidden width of a feed-forward layer or an expert.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

from mhmoe_kernels.abilities import ExpertFunction

FLOAT32 = 4
"""Bytes of a value in float32."""


class Architecture(ABC):
    expert_function: ClassVar[ExpertFunction]
    """The function of a dense feed-forward layer and of an expert, under the kernels' name for it."""
    grouped_queries: ClassVar[bool]
    """Whether several attention heads may share keys and values (`model.kv_heads`)."""
    longest_sequence: ClassVar[int | None] = None
    """Tokens beyond which positions leave the range of float32; None if any sequence works."""
    is_mixtral: ClassVar[bool] = False
    """Whether a plain mixture of experts of this architecture is a Mixtral to other tools."""
    runs_in_vllm: ClassVar[bool] = False
    """Whether `serve/vllm` has its layers."""

    norms_per_block: ClassVar[int]
    norm_vectors: ClassVar[int]
    """Parameters of a norm over the width of the model, in vectors of that width."""
    attention_biases: ClassVar[int] = 0
    """Biases of an attention layer, in vectors of the width of the model."""
    expert_matrices: ClassVar[int]
    """Matrix products of a feed-forward layer or an expert, each between widths D and F."""

    tensor_names: ClassVar[tuple[tuple[str, str], ...]]
    """Names of the feed-forward tensors in a checkpoint and in an exported folder, in the notation of
    `checkpoint/huggingface/names.py`."""

    def norm_parameters(self, d: int) -> int:
        """Return the parameters of one norm over rows of width `d`."""
        return self.norm_vectors * d

    def expert_macs(self, width: int, hidden: int) -> int:
        """Return the multiply-adds of a feed-forward layer or an expert for one row."""
        return self.expert_matrices * width * hidden

    @abstractmethod
    def expert_parameters(self, width: int, hidden: int) -> int:
        """Return the parameters of a feed-forward layer or an expert."""

    @abstractmethod
    def norm_kept(self, d: int, size: int) -> int:
        """Return the bytes that the backward needs of a norm for one token, with the operand of the product after it.

        Args:
            d: width of the model.
            size: bytes of a value in matrix products, here and below.
        """

    @abstractmethod
    def attention_kept(self, d: int, kv_width: int, heads: int, size: int) -> int:
        """Return the bytes that the backward needs of an attention layer for one token.

        Args:
            d: width of the model.
            kv_width: width of all keys, and of all values.
            heads: attention heads.
            size: bytes of a value in matrix products.
        """

    @abstractmethod
    def hidden_kept(self, hidden: int, size: int) -> int:
        """Return the bytes that autograd keeps of the hidden row of a feed-forward layer or an expert."""

    @abstractmethod
    def hidden_kept_by_grouped(self, hidden: int, size: int) -> int:
        """Return the same for kernel `grouped`, whose backward is written by hand and keeps less."""
