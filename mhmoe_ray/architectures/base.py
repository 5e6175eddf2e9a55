"""The interface of an architecture: its options in a spec, counts for the planner, and names of exported tensors.

Methods take sizes as plain numbers: d is the width of the model, `width` (D) that of the rows, tokens or sub-tokens, of
a feed-forward layer or an expert, `hidden` (F) its hidden width, and `size` the bytes per value in matrix products.
"""

# The spec imports this package, so nothing here may need a spec.

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal

from mhmoe_kernels.abilities import ExpertFunction, KernelName

FLOAT32 = 4  # bytes per value


class Architecture(ABC):
    """Transformer architecture without its modules."""

    expert_function: ClassVar[ExpertFunction]  # of dense layers and experts, by its name in mhmoe_kernels
    grouped_queries: ClassVar[bool]  # True if attention heads may share keys and values (`model.kv_heads`)
    longest_sequence: ClassVar[int | None] = None  # length within float32's range of positions; None for any
    runs_in_vllm: ClassVar[bool] = False  # True if `serving/vllm` implements the layers

    reads_tokens: ClassVar[bool] = True  # False if only vision models can have the layers, as they have no positions

    norms_per_block: ClassVar[int]
    norm_vectors: ClassVar[int]  # parameter vectors of a norm, each as wide as the model
    attention_bias: ClassVar[Literal["none", "qkv", "all"]] = "none"
    """Projections of attention that have a bias, unless the spec chooses them (`model.attention_bias`)."""
    has_trunk_options: ClassVar[bool] = False  # a spec may choose attention's biases and norms, and position scaling
    expert_matrices: ClassVar[int]  # products in a feed-forward layer or an expert, each between widths D and F
    dense_launches: ClassVar[int] = 0
    """GPU kernels of a block with a dense feed-forward layer, forward and backward; vision models do not count them."""
    mixture_launches: ClassVar[Mapping[KernelName, int]] = {}
    """GPU kernels that a block with experts and h = 1 launches, forward and backward, by expert kernel."""

    tensor_names: ClassVar[tuple[tuple[str, str], ...]] = ()
    """Feed-forward tensors, as pairs of the name in a checkpoint and the name in an exported Hugging Face model, in the
    notation of `checkpoint/huggingface/names.py`."""

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
    def norm_saved_bytes(self, d: int, size: int) -> int:
        """Return the bytes per token that a norm saves for the backward, including the next product's operand."""

    @abstractmethod
    def attention_saved_bytes(self, q_width: int, kv_width: int, heads: int, size: int) -> int:
        """Return the bytes per token that attention saves for the backward, from the widths of all queries (or the
        result) and of all keys (or all values)."""

    @abstractmethod
    def hidden_saved_bytes(self, hidden: int, size: int) -> int:
        """Return the bytes that autograd saves for one hidden row."""

    @abstractmethod
    def grouped_hidden_saved_bytes(self, hidden: int, size: int) -> int:
        """Return the bytes that expert kernel `grouped`, whose backward needs fewer values, saves for a hidden row."""
