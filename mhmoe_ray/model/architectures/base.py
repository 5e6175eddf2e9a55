"""The interface between the decoder and an architecture: norms, the feed-forward function, positions, initial weights.

Each method has a default where most architectures agree, so that an architecture states what is particular to it.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from mhmoe_kernels import Function
from mhmoe_ray.spec import ModelSpec


class Modules(ABC):
    attention_bias: ClassVar[bool] = False
    """Whether the projections of attention have biases."""

    @abstractmethod
    def norm(self, spec: ModelSpec) -> nn.Module:
        """Return a norm over the width of the model."""

    def inner_norm(self, spec: ModelSpec) -> nn.Module:
        """Return the norm between the values of attention and its output projection."""
        return nn.Identity()

    @abstractmethod
    def function(self, spec: ModelSpec) -> Function:
        """Return what a dense feed-forward layer or an expert computes."""

    @abstractmethod
    def expert_shapes(self, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
        """Return the parameters of a feed-forward layer or an expert by name, in the order of its function's arguments.

        Args:
            width: D, of its rows.
            hidden: F, of its hidden rows.
        """

    def embedding_scale(self, spec: ModelSpec) -> float:
        """Return the factor that embeddings of tokens are multiplied by."""
        return 1.0

    def query_scale(self, head_width: int, position_T: Tensor) -> Tensor | None:
        """Return the factors that rotated queries are multiplied by and keys divided by; None for plain RoPE.

        Args:
            head_width: C.
            position_T: positions, float64.

        Returns:
            (T, C), float64.
        """
        return None

    def rescale_initial(self, name: str, tensor: Tensor, layers: int) -> Tensor:
        """Return a freshly drawn tensor as the architecture starts from it; all start as `model/init.py` draws them by
        default. The tensor may be changed in place.

        Args:
            name: of the tensor, from the decoder on.
            tensor: of one module, or of one expert.
            layers: blocks of the model.
        """
        return tensor
