"""The interface of an architecture: its options in a spec, counts for the planner, and names of exported tensors.

Methods take sizes as plain numbers: d is the width of the model, D the width of a feed-forward layer's or an
expert's rows (tokens or sub-tokens), F the hidden width of a feed-forward layer or an expert.
"""

# The spec imports this package, so nothing here may need a spec.

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal

from mhmoe_kernels.abilities import ExpertFunction, KernelName

FLOAT32 = 4
"""Bytes per float32 value."""


class Architecture(ABC):
    """Transformer architecture: its options, its counts of parameters and bytes, and names of its exported tensors."""

    expert_function: ClassVar[ExpertFunction]
    """Function that a dense feed-forward layer or an expert computes, by its name in mhmoe_kernels."""
    grouped_queries: ClassVar[bool]
    """True if several attention heads may share keys and values (`model.kv_heads`)."""
    longest_sequence: ClassVar[int | None] = None
    """Largest sequence length at which encoded positions stay in the range of float32; None if all lengths do."""
    runs_in_vllm: ClassVar[bool] = False
    """True if `serving/vllm` implements the layers of this architecture."""

    norms_per_block: ClassVar[int]
    norm_vectors: ClassVar[int]
    """Number of parameter vectors of a norm, each as wide as the model."""
    attention_bias: ClassVar[Literal["none", "qkv", "all"]] = "none"
    """Projections of attention that have a bias, unless the spec chooses them (`model.attention_bias`)."""
    has_trunk_options: ClassVar[bool] = False
    """True if a spec may choose biases and norms of attention and the scaling of positions."""
    expert_matrices: ClassVar[int]
    """Number of matrix products in a feed-forward layer or an expert, each between the widths D and F."""
    dense_launches: ClassVar[int]
    """Number of GPU kernels that a block with a dense feed-forward layer launches, forward and backward."""
    mixture_launches: ClassVar[Mapping[KernelName, int]]
    """Number of GPU kernels that a block with experts and h = 1 launches, forward and backward, by expert kernel."""

    tensor_names: ClassVar[tuple[tuple[str, str], ...]]
    """Names of the feed-forward tensors, as pairs of the name in a checkpoint and the name in an exported Hugging Face
    model, in the notation of `checkpoint/huggingface/names.py`."""

    def norm_parameters(self, d: int) -> int:
        """Return the number of parameters of one norm over rows of width `d`."""
        return self.norm_vectors * d

    def expert_macs(self, width: int, hidden: int) -> int:
        """Return the number of multiply-adds of a feed-forward layer or an expert for one row.

        Args:
            width: D, the width of its rows.
            hidden: F, the width of its hidden rows.
        """
        return self.expert_matrices * width * hidden

    @abstractmethod
    def expert_parameters(self, width: int, hidden: int) -> int:
        """Return the number of parameters of a feed-forward layer or an expert.

        Args:
            width: D, the width of its rows.
            hidden: F, the width of its hidden rows.
        """

    @abstractmethod
    def norm_saved_bytes(self, d: int, size: int) -> int:
        """Return the bytes per token that a norm saves for the backward.

        They include its result in the precision of the matrix product after it, which reads this result.

        Args:
            d: width of the model.
            size: bytes per value in matrix products.
        """

    @abstractmethod
    def attention_saved_bytes(self, q_width: int, kv_width: int, heads: int, size: int) -> int:
        """Return the bytes per token that an attention layer saves for the backward.

        Args:
            q_width: width of all queries of a token, and of the result before the output projection.
            kv_width: width of all keys of a token, and of all its values.
            heads: number of attention heads.
            size: bytes per value in matrix products.
        """

    @abstractmethod
    def hidden_saved_bytes(self, hidden: int, size: int) -> int:
        """Return the bytes that autograd saves for one hidden row of a feed-forward layer or an expert.

        Args:
            hidden: F, the width of the hidden row.
            size: bytes per value in matrix products.
        """

    @abstractmethod
    def grouped_hidden_saved_bytes(self, hidden: int, size: int) -> int:
        """Return the bytes that the expert kernel `grouped` saves for one hidden row of an expert.

        The kernel's backward is written by hand and needs fewer values than autograd's.

        Args:
            hidden: F, the width of the hidden row.
            size: bytes per value in matrix products.
        """
