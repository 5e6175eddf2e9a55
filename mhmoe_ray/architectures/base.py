"""The interface of an architecture: options for the spec, counts for the planner, names of exported tensors.

Sizes are plain numbers, so that the spec can use an architecture: d is the width of the model, D the width of an
expert's row (d, or d/h), F the hidden width of a feed-forward layer or an expert.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

from mhmoe_kernels.abilities import ExpertFunction

FLOAT32 = 4
"""Bytes per float32 value."""


class Architecture(ABC):
    expert_function: ClassVar[ExpertFunction]
    """Function of a dense feed-forward layer and of an expert, by its name in mhmoe_kernels."""
    grouped_queries: ClassVar[bool]
    """Whether several attention heads may share keys and values (`model.kv_heads`)."""
    longest_sequence: ClassVar[int | None] = None
    """Largest sequence length whose positions stay in the range of float32; None if any length works."""
    is_mixtral: ClassVar[bool] = False
    """Whether other tools know a plain mixture of experts of this architecture as a Mixtral."""
    runs_in_vllm: ClassVar[bool] = False
    """Whether `serve/vllm` implements its layers."""

    norms_per_block: ClassVar[int]
    norm_vectors: ClassVar[int]
    """Parameters of a norm over the width of the model, in vectors of that width."""
    attention_biases: ClassVar[int] = 0
    """Biases of an attention layer, in vectors of the width of the model."""
    expert_matrices: ClassVar[int]
    """Number of matrix products in a feed-forward layer or an expert, each between widths D and F."""

    tensor_names: ClassVar[tuple[tuple[str, str], ...]]
    """Names of the feed-forward tensors, as pairs of the name in a checkpoint and the name in an exported folder, in
    the notation of `checkpoint/huggingface/names.py`."""

    def norm_parameters(self, d: int) -> int:
        """Return the number of parameters of one norm over rows of width `d`."""
        return self.norm_vectors * d

    def expert_macs(self, width: int, hidden: int) -> int:
        """Return the multiply-adds of a feed-forward layer or an expert for one row."""
        return self.expert_matrices * width * hidden

    @abstractmethod
    def expert_parameters(self, width: int, hidden: int) -> int:
        """Return the number of parameters of a feed-forward layer or an expert."""

    @abstractmethod
    def norm_kept(self, d: int, size: int) -> int:
        """Return the bytes that a norm keeps for the backward per token, including the operand of the matrix product
        after it.

        Args:
            d: width of the model.
            size: bytes per value in matrix products, here and below.
        """

    @abstractmethod
    def attention_kept(self, d: int, kv_width: int, heads: int, size: int) -> int:
        """Return the bytes that an attention layer keeps for the backward per token.

        Args:
            d: width of the model.
            kv_width: width of all keys of a token, and of all its values.
            heads: number of attention heads.
            size: bytes per value in matrix products.
        """

    @abstractmethod
    def hidden_kept(self, hidden: int, size: int) -> int:
        """Return the bytes that autograd keeps for one hidden row of a feed-forward layer or an expert."""

    @abstractmethod
    def hidden_kept_by_grouped(self, hidden: int, size: int) -> int:
        """Return the bytes that kernel `grouped` keeps for one hidden row; its backward is written by hand and keeps
        less than autograd."""
